"""The DPO problem on several processes: whole on each or sharded, each with its own pairs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from bench.harness.dpo_problem import PROMPT, Problem, Setting
from raco_fast.dpo.decoders import unwrap

WRAPPERS = ("replicas", "fsdp2")
_TIMEOUT = timedelta(seconds=30)


@contextmanager
def process_group(device: str, rank: int, processes: int, store: str) -> Iterator[None]:
    """Join the processes that meet at the file `store`; on a CPU each has one thread."""
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=processes,
        timeout=_TIMEOUT,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


class SpreadProblem(Problem):
    """A `Problem` whose `sequences` are those of one process.

    Args:
        wrapper: "fsdp2": each decoder layer and then the rest are sharded over all processes;
            "replicas": whole, and under DistributedDataParallel unless it is prepared: our modes
            need no wrapper, plain DPO does.
    """

    def __init__(self, setting: Setting, wrapper: str, prepared: bool) -> None:
        super().__init__(setting, prepared)
        numbers = torch.Generator().manual_seed(dist.get_rank())
        shape = (setting.sequences, setting.tokens - PROMPT - 1)
        self.ids[:, PROMPT:-1] = torch.randint(0, self.stop, shape, generator=numbers)
        self.net: nn.Module = _Scores(self.model, super().scores)
        self.layers = unwrap(self.model).get_decoder().layers
        layers = sum(p.numel() for p in self.layers.parameters())
        self.apart = 1 - layers / sum(p.numel() for p in self.model.parameters())
        """The share of all parameters that no decoder layer has: embedding, head, last norm."""
        if wrapper == "fsdp2":
            from torch.distributed.fsdp import fully_shard

            mesh = dist.init_device_mesh(setting.device, (dist.get_world_size(),))
            for module in (*self.layers, self.net):
                fully_shard(module, mesh=mesh)
        elif not prepared:
            self.net = nn.parallel.DistributedDataParallel(self.net)

    @property
    def trained_bytes(self) -> int:
        """Of the whole parameters that learn, on however many processes they are."""
        return sum(p.numel() * p.element_size() for p in self.params)

    def scores(self) -> Tensor:
        """As `Problem.scores`, by the forward pass that is wrapped."""
        found: Tensor = self.net(self.ids)
        return found

    def gram(self, m: int) -> Tensor:
        """M of the gradients averaged over processes, float64 [m, m], in plain torch.

        Of an unsharded problem; nothing of this library's steps is used.
        """
        losses = self.losses(super().scores(), m)
        of_each = [torch.autograd.grad(loss, self.params, retain_graph=True) for loss in losses]
        G = torch.stack([torch.cat([g.flatten() for g in grads]).double() for grads in of_each])
        dist.all_reduce(G)
        return (G @ G.T).cpu() / dist.get_world_size() ** 2


class _Scores(nn.Module):
    """What is wrapped: only the forward pass of a wrapped module is noticed by its wrapper."""

    def __init__(self, model: nn.Module, scores: Callable[[], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._scores = scores

    def forward(self, ids: Tensor) -> Any:  # FSDP2 expects an argument
        del ids
        return self._scores()
