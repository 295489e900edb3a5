"""Whole runs of the trainer on a CUDA device: what the CPU learns, and to the bit when resumed."""

import pytest
import torch

from raco_fast.dpo.run.trainer import Interrupted, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LORA = {"r": 4, "alpha": 8}


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("mode", ["one_backward", "autograd", "gram_first"])
def test_a_run_learns_what_it_learns_on_the_cpu(runs, make_config, save_tiny, tmp_path, lora, mode):
    folder = save_tiny()  # without dropout, which draws other numbers on other devices
    of_step = {"pairs_per_micro_batch": 8} if mode == "gram_first" else {}
    configs = [
        make_config(
            {"name": str(folder), "device": device, "lora": lora},
            output_dir=str(tmp_path / device),
            cache_dir=str(tmp_path / f"cache-{device}"),
            gradient_mode=mode,
            **of_step,
        )
        for device in ("cpu", "cuda")
    ]
    for config in configs:
        train(config)
    for cpu, cuda in zip(*map(runs.steps, configs), strict=True):
        for name, value in cpu.items():
            # Accuracies and margins of the first step are of differences that are rounding.
            if name.startswith(("loss/", "logps/chosen", "logps/rejected", "raco/gram")):
                assert cuda[name] == pytest.approx(value, abs=2e-3, rel=2e-3), (name, cpu["step"])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("lora", [None, {**LORA, "dropout": 0.2}], ids=["full", "lora"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(
    runs, make_config, monkeypatch, tmp_path, dtype, lora
):
    model = {"device": "cuda", "dtype": dtype, "lora": lora}
    whole, cut = (make_config(model, output_dir=str(tmp_path / n)) for n in ("whole", "cut"))
    runs.interrupt_after(monkeypatch, None)
    train(whole)
    runs.interrupt_after(monkeypatch, 4)
    with pytest.raises(Interrupted):
        train(cut)
    runs.interrupt_after(monkeypatch, None)
    train(cut, resume=True)
    runs.assert_same_run(whole, cut)
