"""The tables of docs/distributed.md: what a step sends and holds, by formula and as measured.

    python -m bench.pages.spread            print them, with the newest committed run

`python -m bench.report --docs` writes them into the page.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from bench.harness.dpo_problem import SHAPES, Setting
from bench.harness.parameters import MODELS, Architecture, elements
from bench.harness.records import Record, latest
from bench.pages.page import by_suite, contestant
from bench.suites.distributed import NAME, PLAIN, SENT
from raco_fast.distributed.replicas import BUCKET_BYTES
from raco_fast.report import markdown_table

_M, _GPUS = (2, 4), (8, 64)
_SIZES = ("Llama-3-8B", "Qwen3-32B", "Llama-3-70B")


def tables(records: Iterable[Record]) -> dict[str, str]:
    """Name of a table in docs/distributed.md -> Markdown.

    Args:
        records: of the run whose counts are shown.
    """
    records = latest(records)
    return {"sent": sent(records), "held": held(records), "computed": computed()}


def sent(records: Sequence[Record]) -> str:
    """Payload by formula, and beside it what the records have counted."""

    def cells(r: Record) -> list[str]:
        return [f"{r['expected']:.2f}", f"{r['payload']:.2f}"]

    return _table(records, ["sends, in θ"], lambda *run: [_formula(*run)], cells)


def held(records: Sequence[Record]) -> str:
    """Memory of a process in MiB by formula, and beside it what the records have measured."""

    def cells(r: Record) -> list[str]:
        p = r["params"]
        model = replace(SHAPES[p.get("shape", Setting.shape)], layers=p["layers"])
        dtype = getattr(torch, p["dtype"])
        found = bytes_held(model, p["wrapper"], contestant(r), p["m"], p["processes"], dtype)
        return [f"{found / 2**20:.0f}", f"{r['memory_bytes'] / 2**20:.0f}"]

    return _table(records, [], lambda *run: [], cells)


def computed() -> str:
    """Memory of a process in GB by formula, bfloat16, without activations."""
    rows = []
    for name in _SIZES:
        for wrapper, mode in SENT:
            run = MODELS[name], wrapper, mode
            found = [bytes_held(*run, m, W, torch.bfloat16) for m in _M for W in _GPUS]
            rows.append([name, *_run(wrapper, mode), *(f"{n / 1e9:.0f}" for n in found)])
    titles = [f"m = {m}, {W} GPUs" for m in _M for W in _GPUS]
    return markdown_table(["model", "run", "mode", *titles], rows)


def bytes_held(
    model: Architecture, wrapper: str, mode: str, m: int, processes: int, dtype: torch.dtype
) -> float:
    """What a process holds at the peak of a step, without activations.

    Weights, AdamW's two states, gradients, and what is whole or on its way. Of replicas: two
    buckets of each objective. Of FSDP2: the weights
    outside of decoder layers stay gathered, and two layers with them (one computes, the next one
    arrives); an ordinary pass has as many whole gradients that are still to be reduced. A pass over
    all objectives has the m gradients of two matrices, at most the head and the largest one of a
    layer, and their parts.
    """
    shapes = model.shapes()
    theta = elements(shapes)
    layers = elements({k: shape for k, shape in shapes.items() if ".layers." in k})
    gathered = theta - layers + 2 * layers / model.layers
    in_flight = m * model.hidden * (model.vocabulary + model.intermediate) * (1 + 1 / processes)
    part, buckets = theta / processes, min(theta, 2 * BUCKET_BYTES / dtype.itemsize)
    numbers = {
        ("replicas", PLAIN): 5.0 * theta,  # gradients, and DistributedDataParallel's buckets
        ("replicas", "autograd"): (4 + m) * theta + m * (part + buckets),
        ("replicas", "one_backward"): (4 + m) * theta + m * (part + buckets),
        ("replicas", "gram_first"): 3 * theta + max(2 * theta + part + buckets, in_flight),
        ("fsdp2", PLAIN): 4 * part + 2 * gathered,
        ("fsdp2", "autograd"): (3 + m) * part + 2 * gathered,
        ("fsdp2", "one_backward"): (3 + m) * part + gathered + in_flight,
        ("fsdp2", "gram_first"): 4 * part + gathered + max(gathered, in_flight),
    }
    return numbers[wrapper, mode] * dtype.itemsize


def _table(
    records: Sequence[Record],
    titles: Sequence[str],
    about: Callable[[str, str], list[str]],
    cells: Callable[[Record], list[str]],
) -> str:
    """A row for each run and mode, with what is said about it and two cells for each m."""
    found = {(r["params"]["wrapper"], contestant(r), r["params"]["m"]): r for r in records}
    rows = [
        [*_run(*run), *about(*run), *(cell for m in _M for cell in _cells(found, (*run, m), cells))]
        for run in SENT
    ]
    of_m = [part for m in _M for part in (f"m = {m}: formula", "measured")]
    return markdown_table(["run", "mode", *titles, *of_m], rows)


def _cells(
    found: Mapping[tuple[str, str, int], Record],
    key: tuple[str, str, int],
    cells: Callable[[Record], list[str]],
) -> list[str]:
    return cells(found[key]) if key in found else ["-", "-"]


def _run(wrapper: str, mode: str) -> list[str]:
    under = {"fsdp2": "FSDP2", "replicas": "DDP" if mode == PLAIN else "replicas"}[wrapper]
    return [under, f"`{mode}`"]


def _formula(wrapper: str, mode: str) -> str:
    per_objective, besides = SENT[wrapper, mode]
    of_m = {0: "", 1: "m + ", 2: "2m + "}[per_objective]
    return f"{of_m}{besides}{' - a' if wrapper == 'fsdp2' else ''}"


def filled(page: str, records: Iterable[Record]) -> str:
    """A page with its tables written anew, between the comments that name them."""
    for name, table in tables(records).items():
        mark = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        page, found = re.subn(mark, lambda x, t=table: f"{x[1]}\n{t}\n\n{x[2]}", page, flags=re.S)
        assert found == 1, name
    return page


def with_counts(runs: Iterable[Sequence[Record]]) -> Sequence[Record]:
    """Of the first run that has any, the records of full training on several processes; or []."""
    of_runs = ([r for r in by_suite(rs, NAME) if _counts(r["params"])] for rs in runs)
    return next((found for found in of_runs if found), [])


def _counts(params: Record) -> bool:
    return params["processes"] > 1 and params["kind"] == "full"


def main() -> None:
    from bench.pages.report import committed

    print("\n\n".join(tables(with_counts(committed().values())).values()))


if __name__ == "__main__":
    main()
