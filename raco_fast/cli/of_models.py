"""The commands that take a trained model."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

from raco_fast.cli.command import Command, speaks


def _merge_options(parser: ArgumentParser) -> None:
    adapter = "folder of an adapter, such as output_dir/model, or a run's output_dir"
    parser.add_argument("adapter", type=str, help=adapter)
    parser.add_argument("folder", type=str, help="of the merged model: new, or empty")
    dtype = "of the merged weights: fp32 or bf16"
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help=dtype)
    base = "the model below the adapter, if not the one that the adapter names"
    parser.add_argument("--base", type=str, default=None, help=base)


def _merge(parser: ArgumentParser, values: Any) -> int:
    from raco_fast.dpo.run.merging import merge

    speaks()
    asked = values.merge
    print(f"saved {merge(asked.adapter, asked.folder, dtype=asked.dtype, base=asked.base)}")
    return 0


OF_MODELS = (
    Command(
        "merge",
        "add an adapter to its base's weights",
        "Save the model that an adapter and its base are together.",
        _merge,
        usage="raco-fast merge ADAPTER FOLDER [--dtype bf16]",
        options=_merge_options,
        of_a_file=False,
    ),
)
