"""How the pairs of a step become micro-batches, and how these are scored.

padded   every response behind its prompt in a row of its own, pairs of like length together
packed   the same sequences one behind the other in a row without padding
pairs    packed, and the responses of a pair share the rows of their prompt
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.harness.lengths import Lengths
from bench.harness.pairs_problem import PairsProblem
from raco_fast.dpo import packed_logps, pair_rows
from raco_fast.dpo.logps import sequence_logps


@dataclass(frozen=True)
class Part:
    """A micro-batch, already on the device.

    Args:
        pairs: their numbers in the step.
        tokens: that the model is run on, padding included.
        logps: float32 [2B] of a model: responses a of these pairs, then b.
    """

    pairs: list[int]
    tokens: int
    logps: Callable[[nn.Module], Tensor]


Way = Callable[[PairsProblem, int], list[Part]]
"""(problem, pairs or tokens of a micro-batch at most) -> the parts of a step."""


def by_length(lengths: Sequence[Lengths]) -> list[int]:
    """Numbers of the pairs, the longest first."""
    return sorted(range(len(lengths)), key=lambda k: (-lengths[k].longer, k))


def padded(problem: PairsProblem, at_once: int) -> list[Part]:
    order = by_length(problem.lengths)
    groups = [order[k : k + at_once] for k in range(0, len(order), at_once)]
    return [_padded_part(problem, group) for group in groups]


def _padded_part(problem: PairsProblem, group: list[int]) -> Part:
    pairs = [problem.pairs[k] for k in group]
    rows = [(p.prompt, response) for p in pairs for response in (p.a,)]
    rows += [(p.prompt, response) for p in pairs for response in (p.b,)]
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.full((len(rows), longest), problem.stop)
    mask, scored = torch.zeros_like(ids), torch.zeros_like(ids)
    for k, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[k, :end] = torch.tensor(prompt + response)
        mask[k, :end] = 1
        scored[k, len(prompt) : end] = 1
    ids, mask = ids.to(problem.setting.device), mask.to(problem.setting.device)
    return Part(group, ids.numel(), lambda model: sequence_logps(model, ids, mask, scored))


def packed(problem: PairsProblem, tokens: int) -> list[Part]:
    return _packed(problem, tokens, share=False)


def pairs(problem: PairsProblem, tokens: int) -> list[Part]:
    return _packed(problem, tokens, share=True)


def _packed(problem: PairsProblem, budget: int, share: bool) -> list[Part]:
    sizes = [x.once if share else x.twice for x in problem.lengths]
    return [_packed_part(problem, group, share) for group in bins(sizes, budget)]


def _packed_part(problem: PairsProblem, group: list[int], share: bool) -> Part:
    prompts, a, b = zip(*(problem.pairs[k] for k in group), strict=True)
    rows = pair_rows(prompts, a, b, share=share).to(problem.setting.device)
    return Part(group, rows.tokens, lambda model: packed_logps(model, rows))


def bins(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """First fit by size, the largest first; what is larger than the budget is alone."""
    found: list[tuple[int, list[int]]] = []
    for k in sorted(range(len(sizes)), key=lambda k: (-sizes[k], k)):
        at = next((i for i, (used, _) in enumerate(found) if used + sizes[k] <= budget), None)
        if at is None:
            found.append((sizes[k], [k]))
        else:
            used, members = found[at]
            found[at] = used + sizes[k], [*members, k]
    return [members for _, members in found]


WAYS: dict[str, Way] = {"padded": padded, "packed": packed, "pairs": pairs}
