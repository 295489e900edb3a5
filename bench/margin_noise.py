"""What bfloat16 does to the margins of pairs, and how much of it is the head's.

    python -m bench.margin_noise MODEL PAIRS [LIMIT] > bench/results/cpu-DATE/margin_noise.txt

Log-probabilities of the responses and margins (a less b) of the first LIMIT (12) pairs, against the
same bfloat16 weights computed in float32: root mean squares, in nats. The hidden states of the
bfloat16 decoder are scored by a head whose logits are bfloat16 (the model's own), and by
`engine.lm_head`; all responses padded to one batch, and each alone. MODEL is what `model.name` may
be, PAIRS a file of pairs. Six minutes for 12 pairs on one core without bfloat16 instructions.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raco_fast import __version__
from raco_fast.dpo.data.data_source import DataSource
from raco_fast.dpo.data.rendering import TokenOptions
from raco_fast.dpo.data.sources import read_sources
from raco_fast.dpo.data.tokenization import EncodedPair, collate, encode_pairs
from raco_fast.dpo.decoders import hidden_states, logit_shape
from raco_fast.dpo.models import ModelOptions
from raco_fast.dpo.policy import load_base_model, load_tokenizer
from raco_fast.engine.lm_head import token_logps

OBJECTIVES = ("helpful", "harmless")
MAX_LENGTH = 128  # tokens of a prompt with its response; longer prompts lose their beginning


def main() -> None:
    """Print a table."""
    torch.set_num_threads(1)
    name, file, limit = sys.argv[1], sys.argv[2], int((*sys.argv, 12)[3])
    pairs = encoded_pairs(name, file, limit)
    model = load_base_model(ModelOptions(name=name, dtype="bf16", device="cpu")).eval()
    found = {(head, "padded"): logps for head, logps in of_rows(model, pairs).items()}
    rows = [of_rows(model, [pair], slice(k, k + 1)) for k in range(2) for pair in pairs]
    found |= {(head, "alone"): torch.cat([row[head] for row in rows]) for head in rows[0]}
    exact = of_rows(model.float(), pairs)["float32 results"]
    tokens = [len(ids) for pair in pairs for ids in (pair.a_ids, pair.b_ids)]
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"raco_fast {__version__}, torch {torch.__version__}, CPU ({capability}), one thread")
    print(f"{len(pairs)} pairs, {sum(tokens) / len(tokens):.0f} tokens a response on average")
    print("root mean square, nats".ljust(44), "a response   a margin   largest margin's")
    for (head, layout), scored in found.items():
        show(f"{head}, {layout}, against float32", scored - exact)
    rounding = found["bfloat16 logits", "padded"] - found["float32 results", "padded"]
    show("the rounding of logits alone", rounding)
    for head in ("bfloat16 logits", "float32 results"):
        show(f"{head}, padded against alone", found[head, "padded"] - found[head, "alone"])


def show(what: str, difference: Tensor) -> None:
    """A line of the table; difference: [2 * pairs], responses a, then b."""
    a, b = difference.chunk(2)
    rms, margins = difference.square().mean().sqrt(), a - b
    of_margins = margins.square().mean().sqrt()
    print(what.ljust(44), f"{rms:.3f}        {of_margins:.3f}      {margins.abs().max():.3f}")


def encoded_pairs(name: str, file: str, limit: int) -> list[EncodedPair]:
    """The first pairs of a file, in tokens."""
    tokenizer = load_tokenizer(ModelOptions(name=name, device="cpu"))
    pairs = read_sources([DataSource(path=file, limit=limit)], OBJECTIVES)
    return encode_pairs(tokenizer, pairs, TokenOptions(max_length=MAX_LENGTH))[0]


@torch.no_grad()
def of_rows(model: Any, pairs: list[EncodedPair], row: slice = slice(None)) -> dict[str, Tensor]:
    """Head -> float64 sums of the log-probabilities of some rows, cut to the longest of them.

    Args:
        row: which of the responses a, then b of the pairs.
    """
    batch = collate(pairs, 0)
    length = int(batch.attention_mask[row].sum(1).max())
    ids, mask, scored = (
        t[row, :length] for t in (batch.input_ids, batch.attention_mask, batch.completion_mask)
    )
    places = scored.nonzero(as_tuple=True)
    hidden = hidden_states(model, ids, mask)[places[0], places[1] - 1]
    targets, head = ids[places], model.get_output_embeddings()
    shape = logit_shape(model.config)
    rounded = shape(F.linear(hidden, head.weight, head.bias).float())
    logps = {
        "bfloat16 logits": -F.cross_entropy(rounded, targets, reduction="none"),
        "float32 results": token_logps(hidden, head.weight, head.bias, targets, shape=shape),
    }
    by_row = torch.zeros(len(ids), dtype=torch.float64)
    return {name: by_row.index_add(0, places[0], x.double()) for name, x in logps.items()}


if __name__ == "__main__":
    main()
