"""A command line: a file's settings, and options that replace them."""

from dataclasses import dataclass, field

import pytest

from raco_fast.settings.arguments import UsageError, settings_of


@dataclass
class Lora:
    r: int = 8


@dataclass
class Model:
    name: str
    lora: Lora | None = None
    note: str | None = None


@dataclass
class Config:
    model: Model
    lr: float = 1.0
    weights: dict[str, float] = field(default_factory=dict)
    rule: str | dict[str, float | str] = "x"
    board: bool = False
    names: str | list[str] | None = None
    data: list[Model] = field(default_factory=list)


def read(*arguments):
    return settings_of(arguments, Config, ["resume"])


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        (["--lr", "2e-5"], {"lr": 2e-5}),
        (["--lr=-1"], {"lr": -1}),
        (["--lr", "-1"], {"lr": -1}),
        (["--lr=1", "--lr=2"], {"lr": 2}),
        (["--model.name", "12"], {"model": {"name": "12"}}),
        (["--model.name=[x"], {"model": {"name": "[x"}}),
        (["--model.lora.r=4", "--model.name=m"], {"model": {"lora": {"r": 4}, "name": "m"}}),
        (["--model.lora=null"], {"model": {"lora": None}}),
        (["--model.note=null"], {"model": {"note": None}}),
        (["--weights", "{no: 0.4, yes: 0.6}"], {"weights": {"no": 0.4, "yes": 0.6}}),
        (["--weights.a.b=1"], {"weights": {"a": {"b": 1}}}),
        (["--rule=fair"], {"rule": "fair"}),
        (["--rule={name: fair, alpha: 2}"], {"rule": {"name": "fair", "alpha": 2}}),
        (["--rule.name=fair", "--rule.alpha=2"], {"rule": {"name": "fair", "alpha": 2}}),
        (["--names=[a, b]"], {"names": ["a", "b"]}),
        (["--names=null"], {"names": None}),
        (["--board"], {"board": True}),
        (["--board", "no"], {"board": False}),
        (["--board=true", "--lr=3"], {"board": True, "lr": 3}),
        (["--no_board", "--lr=3"], {"board": False, "lr": 3}),
        (["--data=[{name: x}]"], {"data": [{"name": "x"}]}),
    ],
)
def test_options_are_read_as_their_settings_ask(arguments, settings):
    if arguments == ["--weights.a.b=1"]:
        with pytest.raises(UsageError, match=r"--weights.a.b is no option, got 'weights.a.b'"):
            read(*arguments)
    else:
        assert read(*arguments) == (settings, {"resume": False})


def test_options_replace_what_the_file_says(tmp_path, monkeypatch):
    file = tmp_path / "c.yaml"
    file.write_text("{model: {name: m, lora: {r: 2}}, lr: 3, rule: plain}")
    expected = {"model": {"name": "m", "lora": {"r": 9}}, "lr": 4, "rule": "plain"}
    options = ["--model.lora.r=9", "--lr", "4", "--resume"]
    monkeypatch.setenv("HOME", str(tmp_path))
    for first in ([str(file)], ["--config", str(file)], ["~/c.yaml"], ["--config=~/c.yaml"]):
        assert read(*first, *options) == (expected, {"resume": True})
    assert read("--lr=4", *options[:1], "--resume", "--config", str(file))[0] == expected
    with pytest.raises(UsageError, match=r"--rule\.name is a part of `rule`, which is 'plain'"):
        read(str(file), "--rule.name=x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lrr=1"], r"--lrr is no option, got 'lrr'; did you mean 'lr'\?"),
        (["--model.nam=1"], r"--model.nam is no option, got 'model.nam'; did you mean 'name'\?"),
        (["--model.name.x=1"], "--model.name.x is no option"),
        (["--lr"], "--lr must have a value after it, got none"),
        (["--lr", "--board"], "--lr must have a value after it"),
        (["--config"], "--config must have a value after it"),
        (["x", "y"], "options must begin with '--', got 'y'"),
        (["--"], "options must begin with '--'"),
        (["--=3"], "options must begin with"),
        (["--resume=maybe"], "--resume must be true or false, got 'maybe'"),
        (["--no_lr"], "--no_lr is no option"),
        (["--config=a", "--config=b"], "--config must be given once"),
    ],
)
def test_what_is_no_option_is_named(arguments, message):
    with pytest.raises(UsageError, match=message):
        read(*arguments)


def test_values_that_are_no_yaml_name_the_option():
    with pytest.raises(ValueError, match=r"`--weights`:1: a name must be given once, got 'a'"):
        read("--weights={a: 1, a: 2}")
    with pytest.raises(ValueError, match=r"`--lr`:1: text must be YAML"):
        read("--lr=[1")
