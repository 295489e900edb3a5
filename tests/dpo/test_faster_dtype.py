"""Which dtype a model trains faster in: what is measured, and what follows from it."""

from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from raco_fast.dpo import faster_dtype as module
from raco_fast.dpo.faster_dtype import Timings, faster_dtype

CPU = torch.device("cpu")
TINY = LlamaConfig(hidden_size=64, intermediate_size=96, num_attention_heads=2)


@pytest.mark.parametrize(
    ("fp32", "bf16", "faster"),
    [(10, 40, "fp32"), (10, 9, "fp32"), (12, 10, "fp32"), (13, 10, "bf16")],
)
def test_bfloat16_has_to_be_clearly_faster(fp32, bf16, faster):
    found = Timings(fp32, bf16, 2)
    assert found.faster == faster
    assert f"{fp32:.1f} ms in float32 and {bf16:.1f} ms in bfloat16" in str(found)
    assert "2 thread(s)" in str(found)


@pytest.mark.parametrize("full", [True, False])
def test_a_cpu_is_measured_in_both_and_nothing_else_changes(full, monkeypatch):
    seen = []
    linear = torch.nn.functional.linear

    def watched(x, weight, *rest):
        seen.append((weight.dtype, weight.requires_grad, tuple(weight.shape)))
        return linear(x, weight, *rest)

    monkeypatch.setattr(module.F, "linear", watched)
    before = torch.get_rng_state()
    with torch.no_grad():
        name, why = faster_dtype(TINY, CPU, full=full)
    assert torch.equal(torch.get_rng_state(), before)
    assert {dtype for dtype, _, _ in seen} == {torch.float32, torch.bfloat16}
    assert {trained for _, trained, _ in seen} == {full}
    assert {shape for _, _, shape in seen} == {(192, 64), (64, 64), (192, 64), (64, 96)}
    assert name in ("fp32", "bf16")
    assert "forward and backward on 1 thread(s) of this CPU" in why


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (LlamaConfig(hidden_size=4096, intermediate_size=14336), (512, 1792)),
        (LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=2), (64, 106)),
        (GPT2Config(n_embd=128), (128, 512)),
        (SimpleNamespace(get_text_config=SimpleNamespace), (512, 2048)),
    ],
)
def test_the_block_has_the_model_s_ratio_and_is_never_large(config, sizes):
    assert module._sizes(config) == sizes


def test_slow_bfloat16_is_run_once(monkeypatch):
    """Without instructions for it a single pass takes longer than all the others."""
    times = iter([1.0, 1.0, 1.0, 3.5])
    monkeypatch.setattr(module, "_milliseconds", lambda _: next(times))
    assert module.measured(64, 96, full=False).faster == "fp32"
    times = iter([3.0, 2.0, 3.0, 5.0, 0.9, 1.0, 1.1])
    assert module.measured(64, 96, full=False) == Timings(2.0, 0.9, torch.get_num_threads())


@pytest.mark.parametrize(("has_it", "name"), [(True, "bf16"), (False, "fp32")])
def test_a_gpu_takes_bfloat16_where_it_has_it(has_it, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_it)
    assert faster_dtype(TINY, torch.device("cuda"), full=True)[0] == name


def test_other_devices_stay_with_float32():
    name, why = faster_dtype(TINY, torch.device("mps"), full=True)
    assert (name, why) == ("fp32", "bfloat16 was never compared on mps")
