"""Floating-point operations that a DPO step needs, by its tokens: what MFU is a share of.

A matrix product of a token costs 2 operations a weight forward, as many for the gradient of its
input, and as many again for that of its weight, where it is trained. The head takes scored tokens
only. Causal attention costs 4 · heads · head size for each pair of tokens that see each other,
forward, and twice that backward. What is computed again (a head in blocks, checkpoints), norms,
adapters (2 % at rank 16 of SmolLM2) and the optimizer are not counted.
"""

from collections.abc import Sequence

from bench.harness.dpo_problem import SHAPES
from bench.harness.lengths import Lengths
from bench.harness.pairs_problem import PairsSetting


def of_step(setting: PairsSetting, lengths: Sequence[Lengths], shared: bool) -> float:
    """Of one step on pairs of these lengths, forward and backward, padding not counted.

    Args:
        shared: whether the prompt of a pair is counted once.
    """
    shape = SHAPES[setting.shape]
    queries, keys = shape.heads * shape.head, shape.key_value_heads * shape.head
    layer = shape.hidden * (2 * queries + 2 * keys + 3 * shape.intermediate)
    tokens = sum(x.once if shared else x.twice for x in lengths)
    scored = sum(x.a + x.b for x in lengths)
    products = setting.layers * layer * tokens + shape.vocabulary * shape.hidden * scored
    seen = sum(_seen(x, shared) for x in lengths)
    weights = 2 if setting.kind == "full" else 1
    return 2.0 * (1 + weights) * products + 12.0 * setting.layers * queries * seen


def _seen(x: Lengths, shared: bool) -> int:
    """Pairs of tokens of which one sees the other, itself included."""

    def triangle(n: int) -> int:
        return n * (n + 1) // 2

    if shared:
        return triangle(x.prompt + x.a) + triangle(x.prompt + x.b) - triangle(x.prompt)
    return triangle(x.prompt + x.a) + triangle(x.prompt + x.b)
