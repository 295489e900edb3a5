"""SIGKILL at any moment: a run goes on from a whole checkpoint and ends with the same bits."""

from pathlib import Path

import pytest
import yaml
from killed_runs import (
    killed_at_calls,
    killed_at_moments,
    run_alone,
    saves_killed_at_every_call,
)


@pytest.fixture
def settings_file(settings, tmp_path) -> Path:
    """Dropout on; a record, a checkpoint or an evaluation at every step, several kept."""
    changes = {"save_every": 2, "eval_every": 3, "keep": 2, "keep_best": "sure", "max_steps": 6}
    changes |= {"pairs_per_step": 4, "pairs_per_micro_batch": 2, "check_every": None}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings | changes))
    return file


def test_a_save_killed_before_any_of_its_calls_leaves_a_whole_checkpoint(tmp_path):
    calls = run_alone(saves_killed_at_every_call, tmp_path, folder=tmp_path, timeout=120)
    assert calls > 30


def test_a_run_killed_at_five_moments_ends_as_if_it_had_not_been(settings_file, tmp_path):
    given = (settings_file, tmp_path, 5, 5, 0)
    assert run_alone(killed_at_moments, *given, folder=tmp_path, timeout=240) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_runs_killed_at_a_hundred_moments_end_as_if_they_had_not_been(
    settings_file, tmp_path, seed
):
    given = (settings_file, tmp_path, 25, 2 if seed % 2 else 5, seed)
    assert run_alone(killed_at_moments, *given, folder=tmp_path, timeout=900) >= 5


PARTS = 4


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_a_run_killed_before_any_of_its_calls_ends_as_if_it_had_not_been(
    settings_file, tmp_path, part
):
    given = (settings_file, tmp_path, part, PARTS)
    assert run_alone(killed_at_calls, *given, folder=tmp_path, timeout=900) > 15
