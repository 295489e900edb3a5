"""docs/model_zoo.md and the record it is written from, bench/results/model_zoo.json.

python tests/helpers/model_zoo_page.py                  judge every family, write both
python tests/helpers/model_zoo_page.py llama gpt2 ...   judge these again, write both
python tests/helpers/model_zoo_page.py --docs           only write the page
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from model_zoo import NOT_ADAPTED, NOT_BUILT, causal_lms
from model_zoo_verdicts import KINDS, MODES, PASSED, Verdict, described, judge, subject

from raco_fast.report import markdown_table

ROOT = Path(__file__).resolve().parent.parent.parent
RECORD = ROOT / "bench" / "results" / "model_zoo.json"
PAGE = ROOT / "docs" / "model_zoo.md"

INTRODUCTION = """\
# Model zoo

Every causal language model of transformers {transformers} (`AutoModelForCausalLM`), built tiny from
its own configuration with a layer of every kind, in float32 on torch {torch}. Each is prepared
and trained in full and with LoRA on every linear layer, with `one_backward` and `gram_first`;
every parameter's gradients for three objectives (DPO, IPO, SFT), and the Gram matrix, are compared
with float64 autograd of the model as transformers has it.

- **exact**: one backward pass, and every gradient within 1e-5 of float64, or twice what plain
  float32 autograd makes of it.
- **fallback**: as exact, after a warning that names the parameters or layers for which one pass per
  objective was taken. The last column has what it said in full fine-tuning.
- Anything else is a failure and has its reason in the last column: outputs that are not bit-equal
  to those of the unprepared model, a gradient that is off, an exception.

*max error* is the largest relative error of a parameter's gradients in any of the four runs, of
those that plain float32 gets to 1e-5 (the gradient of a key's bias, say, is 0 but for rounding).
Written by `python tests/helpers/model_zoo_page.py`; `tests/engine/test_model_zoo.py` holds to
it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Judge and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="default: all")
    parser.add_argument("--docs", action="store_true", help="judge nothing")
    args = parser.parse_args(arguments)
    if not args.docs:
        known = {} if not args.families else {(v.family, v.kind, v.mode): v for v in recorded()}
        for family in args.families or causal_lms():
            for v in verdicts(family):
                known[v.family, v.kind, v.mode] = v
                print(v.family, v.kind, v.mode, v.outcome, v.detail[:100], flush=True)
        write(sorted(known.values(), key=lambda v: (v.family, v.kind, v.mode)))
    PAGE.write_text(page(), encoding="utf-8")


def verdicts(family: str) -> Iterator[Verdict]:
    """Of one family, all kinds and modes; an exception is a verdict too."""
    for kind in () if family in NOT_BUILT else KINDS:
        if kind == "lora" and family in NOT_ADAPTED:
            continue
        try:
            of = subject(family, kind)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is the verdict
            yield from (Verdict(family, kind, m, "not built", described(error)) for m in MODES)
        else:
            yield from (judge(of, mode) for mode in MODES)


def write(found: Sequence[Verdict]) -> None:
    """The record, a verdict a line."""
    import transformers

    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    rounded = [
        asdict(v) | {"error": float(f"{v.error:.1e}"), "excess": float(f"{v.excess:.1e}")}
        for v in found
    ]
    lines = [json.dumps(line) for line in (versions, *rounded)]
    RECORD.write_text("\n".join(lines) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Of the libraries that the record is of."""
    return json.loads(RECORD.read_text(encoding="utf-8").splitlines()[0])


def recorded() -> list[Verdict]:
    """All verdicts of the record."""
    lines = RECORD.read_text(encoding="utf-8").splitlines()[1:]
    return [Verdict(**json.loads(line)) for line in lines]


def page() -> str:
    """The text of docs/model_zoo.md."""
    of_family: dict[str, list[Verdict]] = {}
    for v in recorded():
        of_family.setdefault(v.family, []).append(v)
    rows = [
        [
            f"`{family}`",
            f"{max(v.parameters for v in found if v.kind == 'full') / 1e3:.0f} k",
            _outcome(found, "full"),
            _outcome(found, "lora"),
            f"{max(v.error for v in found):.0e}",
            _detail(found),
        ]
        for family, found in of_family.items()
    ]
    left_out = [[f"`{f}`", kind, why] for f, (kind, why) in NOT_BUILT.items()]
    left_out += [[f"`{f}` with LoRA", kind, why] for f, (kind, why) in NOT_ADAPTED.items()]
    parts = [
        INTRODUCTION.format(**versions()),
        _counts(of_family),
        markdown_table(["family", "parameters", "full", "LoRA", "max error", "what"], rows),
        "## Not judged",
        markdown_table(["family", "raises", "why"], left_out),
    ]
    return "\n\n".join(parts) + "\n"


def _counts(of_family: dict[str, list[Verdict]]) -> str:
    lines = []
    for kind, title in zip(KINDS, ("Full fine-tuning", "LoRA"), strict=True):
        counted = Counter(_outcome(f, kind) for f in of_family.values() if _of(f, kind))
        said = ", ".join(f"{n} {outcome}" for outcome, n in counted.most_common())
        lines.append(f"{title}, {counted.total()} families: {said}.")
    return "\n".join(lines)


def _of(found: Sequence[Verdict], kind: str) -> list[Verdict]:
    return [v for v in found if v.kind == kind]


def _outcome(found: Sequence[Verdict], kind: str) -> str:
    """One word if both modes agree."""
    marked = {
        v.mode: v.outcome if v.outcome in PASSED else f"**{v.outcome}**" for v in _of(found, kind)
    }
    if len(set(marked.values())) <= 1:
        return next(iter(marked.values()), "-")
    return ", ".join(f"{mode}: {outcome}" for mode, outcome in marked.items())


def _detail(found: Sequence[Verdict]) -> str:
    """Why: of each failure, and of the fallback in full fine-tuning."""
    failed = {v.detail: f"{v.kind}: " for v in found if v.outcome not in PASSED}
    fallen = {v.detail: "" for v in found if v.outcome == "fallback" and v.kind == "full"}
    text = "; ".join(f"{kind}{_short(detail)}" for detail, kind in (failed or fallen).items())
    return text.replace("|", "\\|")


def _short(detail: str) -> str:
    detail = detail.removeprefix("one backward pass for all objectives would be wrong here: ")
    detail = detail.replace("; taking one pass per objective", "").split("; its layer has no rule")[
        0
    ]
    return detail if len(detail) <= 160 else detail[:157] + "..."


if __name__ == "__main__":
    main()
