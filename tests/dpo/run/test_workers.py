"""How many processes prepare the pairs of a run: what the config says, or what pays."""

import pytest

from raco_fast.dpo.run import inputs
from raco_fast.dpo.run.inputs import load_inputs, workers_to_tokenize


@pytest.mark.parametrize(
    ("pairs", "cores", "workers"),
    [(10**6, 1, 0), (23_000, 2, 0), (25_000, 2, 2), (13_000, 64, 8), (12_000, 64, 0), (0, 4, 0)],
)
def test_as_many_as_pay_for_their_start(pairs, cores, workers):
    assert workers_to_tokenize(pairs, cores) == workers


@pytest.mark.parametrize(("given", "asked"), [(None, 0), (0, 0), (3, 3)])
def test_the_config_decides(make_config, tiny, monkeypatch, given, asked):
    seen = []

    def noted(*args, workers, **kwargs):
        seen.append(workers)
        return encode_pairs(*args, **kwargs)

    encode_pairs = inputs.encode_pairs
    monkeypatch.setattr(inputs, "encode_pairs", noted)
    load_inputs(make_config({"name": str(tiny)}, workers=given))
    assert set(seen) == {asked}


def test_fewer_than_none_are_refused(make_config):
    with pytest.raises(ValueError, match="`workers` must be a number of processes, at least 0, go"):
        make_config(workers=-1)


@pytest.mark.slow  # a start of processes for each file
def test_a_run_has_the_same_pairs(make_config, tiny):
    alone, helped = (
        load_inputs(make_config({"name": str(tiny)}, workers=workers)) for workers in (0, 2)
    )
    assert alone.training == helped.training
    assert alone.held_out == helped.held_out != []
