"""bfloat16 weights learn what float32 weights learn, without a setting."""

import pytest

from raco_fast.dpo.run.trainer import Trainer, train

LR = 5e-6


def margin(make_config, folder, dtype: str, tmp_path, epochs: int, **changes) -> float:
    name = f"{dtype}-{changes.get('rounding')}"
    config = make_config(
        {"name": str(folder), "dtype": dtype, "dropout": False},
        lr=LR,
        weight_decay=0.0,
        epochs=epochs,
        pairs_per_micro_batch=8,
        chunk_tokens=256,
        output_dir=str(tmp_path / name),
        **changes,
    )
    return train(config)["eval_rewards/margins"]


@pytest.mark.parametrize(
    ("epochs", "seed", "least"),
    [(2, 0, 0.6), *(pytest.param(16, s, 0.9, marks=pytest.mark.slow) for s in (0, 1, 2))],
)
def test_the_default_learns_what_float32_weights_learn(
    make_config, save_tiny, preference_files, tmp_path, epochs, seed, least
):
    folder = save_tiny(seed, initializer_range=0.02, hidden_size=64, intermediate_size=96)
    on = {"eval_data": [{"path": str(preference_files[0])}], "seed": seed}
    exact = margin(make_config, folder, "fp32", tmp_path, epochs, **on)
    ours = margin(make_config, folder, "bf16", tmp_path, epochs, **on)
    assert exact > 1e-5
    assert least < ours / exact < 2 - least
    with pytest.warns(
        UserWarning, match=r"rounding to nearest loses \d+% of the updates of bfloat"
    ):
        nearest = margin(make_config, folder, "bf16", tmp_path, epochs, rounding="nearest", **on)
    assert nearest < 0.4 * exact


def test_parameters_of_an_adapter_are_float32(make_config):
    """So rounding is of no concern to them, whatever the base model's dtype."""
    runner = Trainer(make_config({"dtype": "bf16", "lora": {"r": 2}}))
    trained = [p for group in runner.state.optimizer.param_groups for p in group["params"]]
    assert {str(p.dtype) for p in trained} == {"torch.float32"}
