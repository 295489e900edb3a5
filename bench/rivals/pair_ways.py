"""How the pairs of a step become micro-batches, and how these are scored: as in training runs.

padded   every response behind its prompt in a row of its own, pairs of like length together
packed   the same sequences one behind the other in a row without padding
pairs    packed, and the responses of a pair share the rows of their prompt
"""

from dataclasses import dataclass

from torch import Tensor, nn

from bench.harness.pairs_problem import PairsProblem
from raco_fast.dpo.data.collation import PaddedRows, PairBatch
from raco_fast.dpo.data.layout import Kind, Layout
from raco_fast.dpo.scoring import pair_logps

WAYS: tuple[Kind, ...] = ("padded", "packed", "pairs")
_CHUNK_TOKENS = 256


@dataclass(frozen=True)
class Part:
    """A micro-batch.

    Args:
        pairs: their numbers in the step.
    """

    pairs: list[int]
    batch: PairBatch

    @property
    def tokens(self) -> int:
        """That the model is run on, padding included."""
        rows = self.batch.rows
        return rows.input_ids.numel() if isinstance(rows, PaddedRows) else rows.tokens

    def logps(self, model: nn.Module) -> Tensor:
        """float32 [2B]: responses a of these pairs, then b."""
        return pair_logps(model, self.batch, _CHUNK_TOKENS)


def parts(problem: PairsProblem, way: Kind, at_once: int) -> list[Part]:
    """A step in micro-batches, the longest pairs first.

    Args:
        at_once: pairs of a padded micro-batch, or tokens of a packed one, at most.
    """
    layout = Layout(way, at_once, at_once, problem.stop)
    groups = [group for of_process in layout.rounds(problem.pairs) for group in of_process]
    return [Part([int(pair.id) for pair in group], layout.batch(group)) for group in groups]


def attention(way: Kind, device: str) -> str | None:
    """What packed rows are best computed with: on a GPU what leaves out all that they do not see.

    None: the model's own choice.
    """
    return "flex_attention" if device == "cuda" and way != "padded" else None
