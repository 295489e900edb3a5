"""A command line: files of settings, options that replace them, and what neither may hold."""

import functools
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import yaml
from jsonargparse import ArgumentError

from raco_fast.settings.parsing import add_settings, made, new_parser, parsed


@dataclass(frozen=True)
class Lora:
    r: int = 8


@dataclass(frozen=True)
class Model:
    name: str
    lora: Lora | None = None
    note: str | None = None
    side: Literal["left", "right"] = "left"


@dataclass(frozen=True)
class Config:
    model: Model = field(default_factory=lambda: Model("m"))
    lr: float = 1.0
    betas: tuple[float, float] = (0.1, 0.2)
    count: int | None = None
    weights: dict[str, float] = field(default_factory=dict)
    rule: str | dict[str, Any] = "x"
    board: bool = False
    names: str | list[str] | None = None
    data: list[Model] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.rule == "odd":
            raise TypeError("`rule` must not be odd")


@functools.cache
def parser():
    whole, command = new_parser(prog="p"), new_parser()
    add_settings(command, Config, {"quick"})
    whole.add_subcommands().add_subcommand("go", command)
    return whole


def read(*arguments: str) -> Config:
    values = parsed(parser(), ["go", *arguments], Config)
    return made(parser(), values, Config)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--lr", "2e-5"], {"lr": 2e-5}),
        (["--lr", "-1"], {"lr": -1}),
        (["--lr=1", "--lr=2"], {"lr": 2}),
        (["--model.name", "12"], {"model": Model("12")}),
        (["--model.name=[x"], {"model": Model("[x")}),
        (["--model.note={% for x in y %}"], {"model": Model("m", note="{% for x in y %}")}),
        (["--model.lora.r=4", "--model.name=n"], {"model": Model("n", Lora(4))}),
        (["--model.lora=null", "--model.note=null"], {}),
        (["--weights", "{no: 0.4, yes: 0.6, 1: 0}"], {"weights": {"no": 0.4, "yes": 0.6, "1": 0}}),
        (["--rule=fair"], {"rule": "fair"}),
        (["--rule={name: fair, a: 2}"], {"rule": {"name": "fair", "a": 2}}),
        (["--rule.name=fair", "--rule.a=2"], {"rule": {"name": "fair", "a": 2}}),
        (["--names=[a, b]"], {"names": ["a", "b"]}),
        (["--board", "true"], {"board": True}),
        (["--data=[{name: x}]"], {"data": [Model("x")]}),
    ],
)
def test_options_are_read_as_their_settings_ask(arguments, expected):
    assert read(*arguments) == Config(**expected)


def test_the_last_of_files_and_options_holds(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    first, second = tmp_path / "a.yaml", tmp_path / "b.json"
    first.write_text("{model: {name: m, lora: {r: 2}}, lr: 3, rule: plain, weights: {no: 1}}")
    second.write_text('{\n\t"lr": 4, "count": 5\n}')
    files = ["--config", str(first), "--config=~/b.json"]
    expected = {"model": Model("m", Lora(2)), "rule": "plain", "weights": {"no": 1.0}}
    assert read(*files) == Config(**expected, lr=4, count=5)
    assert read(*files, "--lr=9") == Config(**expected, lr=9, count=5)
    assert read("--lr=9", *files) == Config(**expected, lr=4, count=5)


def test_a_printed_config_reads_as_what_it_was_made_of(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    options = [
        "--weights={no: 0.5, 1: 0.5}",
        '--rule={"a b.c": "\\x7f🍵"}',
        "--lr=1e-5",
        "--model.lora.r=3",
    ]
    with pytest.raises(SystemExit) as stop:
        read(*options, "--print_config")
    assert stop.value.code == 0
    file.write_text(capsys.readouterr().out)
    assert yaml.safe_load(file.read_text())["lr"] == 1e-5
    assert read("--config", str(file)) == read(*options)


WRONG = [
    ({"lrr": 1}, r"option 'lrr'; did you mean 'lr'\?"),
    ({"model": {"name": "m", "nots": 1}}, r"option 'model\.nots'.*; did you mean 'model\.note'\?"),
    ({"data": [{"name": "m", "nots": 1}]}, r"'nots' is not accepted; did you mean 'note'\?"),
    ({"model": {"name": 3}}, r'"model\.name".*str.*Got value: 3'),
    ({"lr": "fast"}, r'"lr".*float.*Got value: fast'),
    ({"lr": True}, r'"lr".*float.*Got value: True'),
    ({"count": 1.5}, r'"count".*int'),
    ({"betas": [1]}, r'"betas".*2 elements'),
    ({"model": {"name": "m", "side": "lft"}}, r'"model\.side".*left.*right.*Got value: lft'),
    ({"weights": {"a": None}}, '"weights".*None'),
    ({"board": 1}, '"board".*bool.*1'),
    ({"data": {"name": "x"}}, '"data".*list'),
    ({"lr": None}, "c.yaml: `lr` must have a value, got null; leave it out for its default"),
    ({"data": [{"name": None}]}, r"c.yaml: `data\[0\].name` must have a value, got null"),
    ({"lr": float("nan")}, "c.yaml: `lr` must be finite, got nan; write a number"),
    ({"betas": [0.1, float("inf")]}, r"c.yaml: `betas\[1\]` must be finite"),
    ({"count": 2**63}, r"c.yaml: `count` must be below 2\^63, got 9223372036854775808; write a"),
    ({"rule": {"a": [{"class_path": "os.getcwd"}]}}, r"`rule.a\[0\].class_path` is no setting"),
    ({"model": {"name": "a\0"}}, "c.yaml: `model.name` must be UTF-8 text without NUL"),
    ({"rule": "odd"}, "`rule` must not be odd"),
    ({"config": "other.yaml"}, "c.yaml: `config` is no setting; give --config once for each file"),
    ({"a b": 1}, "a b"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=[str(s)[:40] for s, _ in WRONG])
def test_a_wrong_file_is_refused_by_name(tmp_path, settings, message):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(settings))
    with pytest.raises((ArgumentError, ValueError), match=message):
        read("--config", str(file))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lrr=1"], r"--lrr=1; did you mean 'lr'\?"),
        (["--model.nam=1"], r"--model\.nam=1; did you mean 'model\.name'\?"),
        (["--cou", "1"], "unrecognized arguments: --cou 1"),  # no abbreviations
        (["--lr"], "--lr: expected one argument"),
        (["--config"], "--config: expected one argument"),
        (["x"], "unrecognized arguments: x"),
        (
            ["--weights={a: 1, a: 2}"],
            r'"weights".*; its text:1: a name must be given once, got \'a\'',
        ),
        (["--betas", "[1"], r'"betas".*; its text:1: text must be YAML'),
        (["--weights", "[" * 3000], "nested at most 40 deep"),
        (["--lr=" + "9" * 400], "numbers must have at most 250 digits"),
        (["--betas=['" + "9" * 400 + "', 1]"], "numbers must have at most 250 digits"),
        (["--count=1:30"], "numbers must be decimal, got 1:30"),
        (["--count", "9" * 30], r"below 2\^63"),
        (["--betas=[.nan, 1]"], r"`--betas\[0\]` must be finite"),
        (["--rule={class_path: os.getcwd}"], "`--rule.class_path` is no setting"),
        (["--rule.class_path=os.getcwd"], "`class_path` is no setting"),
        (["--model.note=\udcff"], "must be UTF-8 text without NUL"),
        (["--config=no/such"], "`config` must be a file, got no/such, which is nothing"),
        (["--config=~no_such_user/x"], "`config` begins with '~'"),
    ],
)
def test_a_wrong_option_is_refused_by_name(arguments, message):
    with pytest.raises((ArgumentError, ValueError, OSError), match=message):
        read(*arguments)
