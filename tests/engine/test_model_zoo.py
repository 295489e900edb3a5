"""Every causal language model of transformers: right gradients, or a fallback that says where."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import model_zoo
import model_zoo_page
import pytest
import transformers
from model_zoo_verdicts import KINDS, MODES, PASSED, Subject, judge, subject

# Dense, learned positions, ALiBi, sliding windows, experts, latent attention, state spaces.
QUICK = (
    *("bart", "bloom", "deepseek_v3", "falcon", "gemma3_text", "gpt2", "jamba", "llama", "mamba"),
    *("mixtral", "opt", "phi", "qwen3_next", "rwkv"),
)
FAMILIES = model_zoo.causal_lms()
OF_THE_RECORD = model_zoo_page.versions()["transformers"] == transformers.__version__


def cases() -> list[Any]:
    """Family, kind, mode; neighbours share a model."""
    return [
        pytest.param(family, kind, mode, marks=[] if family in QUICK else pytest.mark.slow)
        for family in FAMILIES
        if family not in model_zoo.NOT_BUILT
        for kind in KINDS
        if not (kind == "lora" and family in model_zoo.NOT_ADAPTED)
        for mode in MODES
    ]


@pytest.fixture(scope="module")
def model_of() -> Callable[[str, str], Subject]:
    return lru_cache(maxsize=1)(subject)


@pytest.mark.parametrize(("family", "kind", "mode"), cases())
def test_gradients_are_right_or_the_fallback_says_where(
    family: str, kind: str, mode: str, model_of: Callable[[str, str], Subject]
) -> None:
    verdict = judge(model_of(family, kind), mode)
    assert verdict.outcome in PASSED, verdict.detail


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({*model_zoo.NOT_BUILT} & {*FAMILIES}))
def test_what_is_not_built_cannot_be(family: str) -> None:
    kind, why = model_zoo.NOT_BUILT[family]
    with pytest.raises(Exception) as raised:  # noqa: PT011  # its class is data
        subject(family, "full")
    assert type(raised.value).__name__ == kind, why


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({*model_zoo.NOT_ADAPTED} & {*FAMILIES}))
def test_what_is_not_adapted_cannot_be(family: str) -> None:
    kind, why = model_zoo.NOT_ADAPTED[family]
    with pytest.raises(Exception) as raised:  # noqa: PT011  # its class is data
        subject(family, "lora")
    assert type(raised.value).__name__ == kind, why


def test_the_lists_are_of_families_that_there_are() -> None:
    if OF_THE_RECORD:
        listed = {*QUICK, *model_zoo.NOT_BUILT, *model_zoo.NOT_ADAPTED, *model_zoo.CHANGES}
        assert listed <= {*FAMILIES}


def test_families_are_tiny_and_keep_a_layer_of_each_kind() -> None:
    for family, kinds in {
        "gemma3_text": ["sliding_attention", "full_attention"],
        "qwen3_next": ["linear_attention", "full_attention"],
        "jamba": ["linear_attention", "full_attention"],
    }.items():
        assert model_zoo.tiny(family).layer_types == kinds
    assert sum(p.numel() for p in model_zoo.build("llama").parameters()) < 30_000


def test_the_page_is_written_from_the_record() -> None:
    assert model_zoo_page.page() == model_zoo_page.PAGE.read_text(encoding="utf-8")


def test_the_record_has_every_family() -> None:
    if not OF_THE_RECORD:
        pytest.skip("the record is of another release of transformers")
    judged = {(v.family, v.kind, v.mode) for v in model_zoo_page.recorded()}
    assert judged == {tuple(case.values) for case in cases()}
