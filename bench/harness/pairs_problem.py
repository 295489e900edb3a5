"""What whole training steps are measured on: one model, and pairs whose lengths are those of data.

The ids are random; the lengths come from lengths.py. Responses end in the last token of the
vocabulary, which stands for a stop token, so that a trainer which tokenizes text can be given the
same ids. The pairs of a step are fixed, and every contestant learns from the same ones in every
step; how a step is cut into micro-batches is the contestant's own affair.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.harness import lengths
from bench.harness.dpo_problem import BETA, SHAPES, ModelSetting, labels, model_of
from raco_fast.dpo.data.tokenization import EncodedPair
from raco_fast.dpo.logps import sequence_logps

JUDGED = 4
"""Pairs of the step on which it is judged what was learnt."""


@dataclass(frozen=True)
class PairsSetting(ModelSetting):
    """`data` is what `lengths.sample` takes, `pairs` are those of a step."""

    kind: str = "lora"
    shape: str = "SmolLM2-135M"
    layers: int = 30
    data: str = "tldr-like"
    pairs: int = 16
    dtype: str = "float32"
    device: str = "cpu"


class PairsProblem:
    """A model where a run begins (its adapter is fresh) and the pairs of a step, with labels.

    Args:
        attention: how transformers computes it; None is its choice.

    Attributes:
        lengths: of the pairs.
        pairs: their `id` is their number in the step.
        labels: as `labels` gives them, of which objective 0 is what plain DPO trains on.
    """

    def __init__(self, setting: PairsSetting, attention: str | None = None) -> None:
        self.setting = setting
        self.model: nn.Module = model_of(setting, attention=attention)
        self.stop = SHAPES[setting.shape].vocabulary - 1
        self.lengths = lengths.sample(setting.data, setting.pairs)
        self.pairs = [self._pair(k, x) for k, x in enumerate(self.lengths)]
        self.labels = labels(setting.pairs)

    def _pair(self, k: int, x: lengths.Lengths) -> EncodedPair:
        """Random ids; responses begin with different tokens: they share their prompt, no more."""
        ids = torch.randint(0, self.stop, (x.once,)).tolist()
        prompt, answers = ids[: x.prompt], ids[x.prompt :]
        a, b = answers[: x.a - 1], answers[x.a : -1]
        if a and b and a[0] == b[0]:
            b[0] = (a[0] + 1) % self.stop
        return EncodedPair(str(k), prompt, [*a, self.stop], [*b, self.stop], {})

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.trained.values())

    def losses(self, margins: Tensor, pairs: list[int], m: int) -> list[Tensor]:
        """What some pairs add to DPO's loss of the first m objectives.

        Args:
            margins: how much further a is above its reference than b, for each of `pairs`.
        """
        of_pairs = self.labels[:m, pairs].to(margins)
        terms = -torch.nn.functional.logsigmoid(BETA * of_pairs * margins)
        return list(terms.sum(1) / len(self.pairs))


class Judge:
    """The same ruler for everyone, from where the model is at the start.

    Pairs are scored one by one, as plainly as can be: no batch, padding or packing of a contestant
    is in it.
    """

    def __init__(self, problem: PairsProblem) -> None:
        self._problem = problem
        self._start = self._margins()

    def loss(self) -> float:
        """DPO's loss of objective 0 on the judged pairs."""
        moved = BETA * (self._margins() - self._start)
        return float(-torch.nn.functional.logsigmoid(moved).mean())

    @torch.no_grad()
    def _margins(self) -> Tensor:
        return torch.cat([self._margin(pair) for pair in self._problem.pairs[:JUDGED]])

    def _margin(self, pair: EncodedPair) -> Tensor:
        model, device = self._problem.model, self._problem.setting.device
        scores = []
        for response in (pair.a_ids, pair.b_ids):
            ids = torch.tensor([pair.prompt_ids + response], device=device)
            scored = torch.arange(ids.shape[1])[None] >= len(pair.prompt_ids)
            scores.append(sequence_logps(model, ids, torch.ones_like(ids), scored))
        return (scores[0] - scores[1]).cpu()
