"""Token counts stand for the data that they are named after, and are all that is kept of it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from statistics import median

import pytest
import torch

from bench.harness import flops, lengths
from bench.harness.lengths import Lengths
from bench.harness.pairs_problem import PairsProblem, PairsSetting
from tests.helpers.tiny_tokenizers import TOKENIZERS


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where data, tokenizer and counts are; there is nothing yet."""
    for name in ("DATA", "TOKENIZER", "KEPT"):
        monkeypatch.setattr(lengths, name, tmp_path / name)
    return tmp_path


def write_pairs(folder: Path, answers: list[tuple[str, str]]) -> None:
    folder.mkdir(exist_ok=True)
    with gzip.open(folder / "hh_rlhf.test.jsonl.gz", "wt") as lines:
        for k, (a, b) in enumerate(answers):
            turn = {"role": "user", "content": "why"}
            labels = {"helpful": 1, "harmless": 0}
            of_pair = {"response_a": a, "response_b": b, "preferences": labels}
            lines.write(json.dumps({"id": str(k), "prompt": [turn], **of_pair}) + "\n")


def test_real_pairs_are_counted_once_and_nothing_but_numbers_is_kept(places: Path) -> None:
    assert "there is no hh_rlhf.test.jsonl.gz in ../shared/data" in (
        lengths.obstacle("hh_rlhf") or ""
    )
    write_pairs(places / "DATA", [("ZQ", "J"), ("%", "~^|`")])
    assert "fetch_model" in (lengths.obstacle("hh_rlhf") or "")
    TOKENIZERS["bytes"].save_pretrained(places / "TOKENIZER")
    assert lengths.obstacle("hh_rlhf") is None
    (kept,) = (places / "KEPT").iterdir()
    counts = json.loads(kept.read_text())
    # Of these answers every byte is a token; they begin with a space and end with a stop token.
    prompt = len(TOKENIZERS["bytes"]("\n\nHuman: why\n\nAssistant:").input_ids)
    assert [x[1:] for x in counts] == [[4, 3], [3, 6]]
    assert [x[0] for x in counts] == [prompt] * 2
    assert sorted(lengths.sample("hh_rlhf", 2)) == sorted(Lengths(*x) for x in counts)
    write_pairs(places / "DATA", [("ZQZQZ", "J")])
    assert lengths.obstacle("hh_rlhf") is None
    assert [x.a for x in lengths.sample("hh_rlhf", 1)] == [7]


@pytest.mark.parametrize(
    ("data", "of_sequence", "ratio"), [(k, *v) for k, v in lengths.PUBLISHED.items()]
)
def test_shapes_have_the_published_medians(data: str, of_sequence: int, ratio: float) -> None:
    found = lengths.sample(data, 999)
    sequences = [x.prompt + response for x in found for response in (x.a, x.b)]
    assert median(sequences) == pytest.approx(of_sequence, rel=0.1)
    ratios = [2 * x.prompt / (x.a + x.b) for x in found]
    assert median(ratios) == pytest.approx(ratio, rel=0.1)
    assert lengths.sample(data, 8) == lengths.sample(data, 8)


def test_a_sample_stands_for_all() -> None:
    of_all = lengths.sample("ultrafeedback-like", 1000)
    few = lengths.sample("ultrafeedback-like", 16)
    mean, mean_of_few = (sum(x.twice for x in xs) / len(xs) for xs in (of_all, few))
    assert mean_of_few == pytest.approx(mean, rel=0.03)


def test_sequences_of_one_length() -> None:
    assert lengths.sample("ratio-3-64", 2) == [Lengths(48, 16, 16)] * 2
    assert lengths.sample("fixed-64", 1) == [Lengths(8, 56, 56)]
    assert lengths.token_ratio([Lengths(48, 16, 16)]) == 80 / 128
    assert lengths.prompt_ratio([Lengths(48, 10, 22)]) == 3.0


def test_data_that_there_is_not() -> None:
    with pytest.raises(ValueError, match=r"`data` must be one of hh_rlhf, .*, got 'ultra'"):
        lengths.sample("ultra", 4)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_operations_are_those_that_torch_counts(kind: str, shared: bool) -> None:
    """Beside torch's own counter on the projections, head and attention, each written out."""
    from torch.utils.flop_counter import FlopCounterMode

    setting = PairsSetting(kind, "tiny", 2, "ratio-2-12", 2)
    (x, _), shape = lengths.sample(setting.data, 2), flops.SHAPES["tiny"]
    tokens, scored = 2 * (x.once if shared else x.twice), 2 * (x.a + x.b)
    trained = kind == "full"
    problem = PairsProblem(setting)
    weights = [p for name, p in problem.model.named_parameters() if ".layers." in name]
    weights = [p for p in weights if p.ndim == 2 and 16 not in p.shape]
    with FlopCounterMode(display=False) as counter:
        for p, rows in [*((p, tokens) for p in weights), (torch.empty(90, shape.hidden), scored)]:
            inputs = torch.randn(rows, p.shape[1], requires_grad=True)
            (inputs @ p.detach().requires_grad_(trained).T).sum().backward()
    pairs_seen = sum(
        sum(q >= k for q in range(n) for k in range(n)) for n in (x.prompt + x.a, x.prompt + x.b)
    ) - shared * sum(q >= k for q in range(x.prompt) for k in range(x.prompt))
    queries = shape.heads * shape.head
    # Scores and values, 2 operations each; backward two products for each of them.
    attention = 2 * setting.layers * pairs_seen * 2 * 2 * queries * 3
    counted = flops.of_step(setting, lengths.sample(setting.data, 2), shared)
    assert counted == counter.get_total_flops() + attention
