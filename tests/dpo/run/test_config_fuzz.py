"""No config whatever gives a traceback: a message and status 2, or a run that could begin."""

import functools
import json
import logging
import re

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raco_fast.cli import program as cli
from raco_fast.cli.command import EXIT_BAD_INPUT
from raco_fast.dpo.run import trainer
from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.run.identity import identity, keys_of

VALID = {
    "model": {"name": "m", "device": "cpu", "lora": {"r": 4}},
    "data": [{"path": "x.jsonl", "objectives": {"a": {"column": "b", "soft": {"1": 0.75}}}}],
    "eval_data": [{"path": "y.jsonl"}],
    "weights": {"a": 0.5, "b": 0.5},
    "losses": {"a": {"name": "simpo", "gamma": 1.0}, "b": {"name": "modpo", "weight": 0.25}},
    "margin_rewards": {"b": [{"name": "m", "weight": 0.75}]},
    "rule": {"name": "fairgrad", "alpha": 0.5},
    "c_schedule": {"name": "linear", "start": 0.0, "steps": 9},
    "weights_schedule": {"name": "cosine", "end": {"a": 1.0, "b": 0.0}},
    "tokens": {"max_length": 64, "plain": {"user": "U"}},
    "parallel": {"kind": "ddp"},
    "reference": {"sync_steps": 3, "mixup_alpha": 1.0},
    "loss_options": {"beta": 0.2},
    "betas": [0.9, 0.99],
}

WORDS = st.sampled_from(
    ["", "null", "nan", "-1", "1e400", "~", "~nobody/x", "a\0b", "\ud800", "no", "auto", "sigmoid"]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.integers(-3, 3)
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=12)
    | WORDS
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8) | WORDS, inner, max_size=3)
    ),
    max_leaves=8,
)
KEYS = st.sampled_from(sorted(keys_of())) | st.text(max_size=9) | st.sampled_from(sorted(VALID))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "config.yaml"


parser_of = functools.cache(cli.parser_of)  # one takes a second to build


@pytest.fixture(autouse=True)
def no_run(monkeypatch):
    """No run begins; the identity that it would save is made."""

    def begin(config: TrainConfig, resume: bool, overwrite: bool) -> dict:
        json.dumps(identity(config))
        config.folder, config.cache_folder  # noqa: B018
        return {}

    monkeypatch.setattr(trainer, "train", begin)
    monkeypatch.setattr(cli, "parser_of", parser_of)
    root, own = logging.getLogger(), logging.getLogger("raco_fast")
    before = (list(root.handlers), own.level)
    yield
    root.handlers[:], own.level = before


def changed(key: str, value):
    """VALID with another value at a dotted key."""
    config = json.loads(json.dumps(VALID))
    place, *rest = [config], *key.split(".")
    inner = place[0]
    for part in rest[:-1]:
        below = inner.setdefault(part, {})
        inner = below[0] if isinstance(below, list) and below else below
        if not isinstance(inner, dict):
            return config
    inner[rest[-1]] = value
    return config


def check(capfd, file, raw: bytes, *arguments: str) -> None:
    file.write_bytes(raw)
    status = cli.main(["train", str(file), *arguments])
    out, err = capfd.readouterr()
    assert status in (0, EXIT_BAD_INPUT)
    if status == EXIT_BAD_INPUT:
        assert err.startswith("raco-fast: ")
        assert err.count("raco-fast: ") == 1
        assert len(err) < 4000
    assert not re.search(
        r"Traceback|not supported between|has no attribute|unexpected kw", out + err
    )


FEW = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
MANY = settings(FEW, max_examples=10_000)


def text_of(config) -> bytes:
    try:
        return yaml.safe_dump(config, allow_unicode=True).encode()
    except UnicodeEncodeError:
        return json.dumps(config).encode()


@given(st.lists(st.tuples(KEYS, VALUES), min_size=1, max_size=2), st.booleans())
@FEW
def test_any_value_at_any_key(capfd, file, changes, as_json):
    check_values(capfd, file, changes, as_json)


@pytest.mark.slow
@given(st.lists(st.tuples(KEYS, VALUES), min_size=1, max_size=2), st.booleans())
@MANY
def test_any_value_at_any_key_many_times(capfd, file, changes, as_json):
    check_values(capfd, file, changes, as_json)


def check_values(capfd, file, changes, as_json: bool) -> None:
    for key, value in changes:
        config = changed(key, value)
        check(capfd, file, json.dumps(config).encode() if as_json else text_of(config))


TEXT = yaml.safe_dump(VALID)


@st.composite
def mutated(draw) -> bytes:
    """The text of a config with bytes cut out, put in or repeated."""
    raw = bytearray(TEXT.encode())
    for _ in range(draw(st.integers(1, 4))):
        at, length = draw(st.integers(0, len(raw))), draw(st.integers(0, 12))
        put = draw(
            st.binary(max_size=6) | st.sampled_from([b"&a ", b"*a", b"!!x ", b"\t", b"? ", b"<<: "])
        )
        raw[at : at + length] = put
    return bytes(raw)


@given(mutated())
@FEW
def test_any_text(capfd, file, raw):
    check(capfd, file, raw)


@pytest.mark.slow
@given(mutated() | st.binary())
@MANY
def test_any_text_many_times(capfd, file, raw):
    check(capfd, file, raw)


@given(KEYS, st.text(max_size=12) | WORDS | VALUES.map(str))
@FEW
def test_any_option(capfd, file, key, text):
    check_option(capfd, file, key, text)


@pytest.mark.slow
@given(KEYS, st.text(max_size=12) | WORDS | VALUES.map(str))
@MANY
def test_any_option_many_times(capfd, file, key, text):
    check_option(capfd, file, key, text)


def check_option(capfd, file, key: str, text: str) -> None:
    if text.startswith("-") or key.startswith(("h", "print_config")):
        return  # perhaps --help, which prints and exits
    check(capfd, file, TEXT.encode(), f"--{key}={text}")
    check(capfd, file, TEXT.encode(), f"--{key}", text)


QUICK = [None, 10**400, {"class_path": "os.system"}]
REST = [True, 3, -1, 1e400, "x", "9" * 400, [], {}, [[]], {"a": 1}, {"config": "x", "": 0}]


@pytest.mark.parametrize(
    "value",
    [*QUICK, *(pytest.param(v, marks=pytest.mark.slow) for v in REST)],
    ids=lambda v: repr(v)[:24],
)
def test_every_key_refuses_or_takes(capfd, file, value):
    for key in sorted(keys_of()):
        check(capfd, file, json.dumps(changed(key, value)).encode())
