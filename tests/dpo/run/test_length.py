"""Runs that cannot learn are refused, and what a run does otherwise than it reads is said."""

import pytest

from raco_fast.dpo.run.length import odd_settings, warm_up_steps
from raco_fast.dpo.run.trainer import Trainer


@pytest.mark.parametrize("lr", [0, 0.0, -0.0])
def test_a_learning_rate_of_zero_is_refused(make_config, lr):
    with pytest.raises(ValueError, match=r"`lr` must be positive, got -?0.*: nothing would be lea"):
        make_config(lr=lr)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "`lora.r` must be at least 1, got 0"),
        ({"alpha": 0}, "`lora.alpha` must be at least 1: with 0 nothing is learnt, got 0"),
        ({"dropout": 1.0}, r"`lora.dropout` must be in \[0, 1\), got 1.0"),
    ],
)
def test_an_adapter_that_cannot_learn_is_refused(make_config, options, message):
    with pytest.raises(ValueError, match=message):
        make_config({"lora": options})


def test_a_warm_up_that_is_all_of_the_run(make_config, caplog):
    assert [warm_up_steps(0.1, n) for n in (1, 4, 5, 15, 100)] == [0, 0, 0, 2, 10]
    with pytest.raises(ValueError, match=r"`warmup_ratio` must leave the only step .*, got 0.6"):
        Trainer(make_config(max_steps=1, warmup_ratio=0.6))
    Trainer(make_config(max_steps=3, warmup_ratio=0.9))
    assert "makes 3 of 3 steps the warm-up: the learning rate never reaches `lr`" in caplog.text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"max_steps": 10}, None),
        ({"max_steps": 11}, "`max_steps` 11 is more than the 10 steps of 2 epoch"),
        ({"pairs_per_step": 41}, "`pairs_per_step` 41 is more than the 40 training pairs"),
        ({"eval_every": 11}, "`eval_every` 11 is more than the 10 steps of the run: no evaluat"),
        ({"log_every": 11}, "`log_every` 11 is more than the 10 steps of the run: no records"),
        ({"eval_data": [], "eval_every": 2}, "`eval_every` has no effect without `eval_data`"),
        ({"warmup_ratio": 1.0}, "`warmup_ratio` 1.0 makes 10 of 10 steps"),
    ],
)
def test_what_has_another_effect_than_it_reads_is_said(make_config, changes, said):
    found = odd_settings(make_config(**changes), 40, 10)
    assert found == [] if said is None else (len(found) == 1 and found[0].startswith(said))
