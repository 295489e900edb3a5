"""`Reduced`: the gradients of one step, summed over processes as far as a step needs them.

    shards of DTensors        whoever sharded the model has summed them; local products are summed
    replicas, one's own       slices of their sums; see `distributed/replicas.py`
    replicas, said to agree   by a wrapper, inside of `objective(name)`: held against each other

On one process nothing is sent, and the gradients are what they are.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from itertools import compress
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from raco_fast.backends import ops
from raco_fast.backends.plan import Plan
from raco_fast.distributed.dtensor import (
    any_dtensor,
    from_local,
    is_dtensor,
    local,
    placed_like,
    share,
    smaller_mesh,
)
from raco_fast.distributed.processes import Processes
from raco_fast.distributed.replicas import ReplicaSums
from raco_fast.gradients.objective_grad import ObjectiveGrad, Touched, here, joined, known_products

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

# Replicas on unlike processors may differ by the rounding of their own Gram matrices.
_ALIKE = 1e-6

Lists = list[list[Tensor | None]]


class Reduced:
    """The gradients of the touched parameters of each group.

    All processes make one at the same time.

    Args:
        groups: the parameters of each parameter group, and their gradients.
        objectives: how many there are. Of one, replicas' gradients are the wrapper's affair, as
            with any optimizer.
        processes: those that train together.
        plan: of operations on these gradients.

    Attributes:
        groups: the same, with what is touched on any process.
    Raises:
        RuntimeError: some gradients have been averaged over the processes, others not.
        ValueError: DTensors that do not lie on all processes.
    """

    def __init__(
        self, groups: Sequence[Touched], objectives: int, processes: Processes, plan: Plan
    ) -> None:
        self._processes, self._plan = processes, plan
        sharded = any(any_dtensor(group.params) for group in groups)
        self._several = processes.size > 1 and (sharded or objectives > 1)
        self._guarded = objectives > 1
        # By how much their products count, and by their mesh where others hold copies of it.
        self._shards: dict[tuple[float, DeviceMesh | None], Touched] = {}
        self._said_to_agree: Lists = []
        self._sums: ReplicaSums | None = None
        self.groups = [_placed(group) for group in groups] if sharded else list(groups)
        self._whole = not (self._several or sharded)
        if self._whole:
            return
        params, grads = joined(self.groups)
        self._objectives = len(grads)
        own, self._compares = self._are_own(params) if self._several else (False, False)
        if own:
            self.groups = _touched_anywhere(self.groups, processes)
            params, grads = joined(self.groups)
        for k, p in enumerate(params):
            if is_dtensor(p):
                kind = share(p, processes.size), smaller_mesh(p, processes.size)
                shards = self._shards.setdefault(kind, Touched([], [[] for _ in grads]))
                shards.params.append(p)
                for of_objective, one in zip(shards.grads, grads, strict=True):
                    of_objective.append(one[k])
        replicas = [not is_dtensor(p) for p in params]
        of_replicas = [list(compress(one, replicas)) for one in grads]
        if own:
            self._sums = ReplicaSums(list(compress(params, replicas)), of_replicas, processes)
        elif any(replicas) or self._compares:
            self._said_to_agree = of_replicas

    @property
    def waits(self) -> str | None:
        """Why a step along these gradients has to wait for the device; None if it need not."""
        copies = any(mesh is not None for _, mesh in self._shards)
        if self._several and (copies or self._sums is not None or self._said_to_agree):
            return "gradients of replicas are averaged or compared over processes"
        return None

    def gram(
        self, numbers: Sequence[Tensor], settings: Callable[[], object]
    ) -> tuple[Tensor, list[float]]:
        """The Gram matrix of the averages over processes, and the values of some numbers.

        Args:
            numbers: one element each, a GradScaler's.
            settings: what a step depends on besides gradients; the same on all processes.
        Returns:
            ([m, m] float64 on the CPU, means of the numbers over the processes): the same bits on
            all of them.
        Raises:
            RuntimeError: replicas have other gradients, or processes other settings; on all.
        """
        if self._whole:
            touched = joined(self.groups)
            return ops.gram_beside(touched.grads, numbers, self._plan, known_products(touched))
        M = self._local_gram()
        upper = torch.triu_indices(*M.shape, device=M.device)
        code = _code(settings())
        parts = [M[upper[0], upper[1]], M.new_tensor([code, code**2])]
        sums = self._processes.sum(torch.cat([*parts, *(x.reshape(1).to(M) for x in numbers)]))
        sizes = [upper.shape[1], 2, len(numbers)]
        triangle, codes, values = torch.split(sums.cpu(), sizes)
        # W Σ code² = (Σ code)² only if all are equal; every process has the same sums.
        if self._processes.size * codes[1] != codes[0] ** 2:
            _refuse(settings())
        M, upper = torch.zeros(M.shape, dtype=torch.float64), upper.cpu()
        M[upper[0], upper[1]] = triangle
        M[upper[1], upper[0]] = triangle
        return ops.within_cauchy_schwarz(M), (values / self._processes.size).tolist()

    def gram_on_device(self) -> Tensor:
        """M on the gradients' device, not waited for; where `waits` is None."""
        if self._whole:
            return self._gram_of(joined(self.groups))
        return ops.within_cauchy_schwarz(self._processes.sum(self._local_gram()))

    def along(self, coefficients: Tensor) -> tuple[list[Touched], Tensor]:
        """(groups, coefficients) whose combination is Σ α_i g_i of the averages, on all processes.

        Where gradients of replicas had to be summed, it is one list, with the coefficient 1.
        """
        if self._sums is None:
            return self.groups, coefficients
        of_replicas = iter(self._sums.combined(coefficients / self._processes.size, wide=True))
        groups = []
        for params, grads in self.groups:
            out: list[Tensor | None] = []
            for k, p in enumerate(params):
                if is_dtensor(p):
                    out.append(_combined_shards(p, [one[k] for one in grads], coefficients))
                else:
                    out.append(next(of_replicas))
            groups.append(Touched(params, [out]))
        return groups, torch.ones(1, dtype=torch.float64)

    def combined(self, coefficients: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(parameters, Σ α_i g_i of each), in the memory of the gradients where they are averages.

        Args:
            coefficients: float64 [m] on the CPU.
        """
        if self._sums is not None:
            params, (along,) = joined(self.along(coefficients)[0])
            return params, [
                g.to(p.dtype) for p, g in zip(params, along, strict=True) if g is not None
            ]
        params, grads = joined(self.groups)
        out = [next(g for g in column if g is not None) for column in zip(*grads, strict=True)]
        lists = [[None if g is None else local(g) for g in one] for one in grads]
        with torch.no_grad():
            ops.combine(lists, coefficients, [local(g) for g in out], self._plan)
        return params, out

    def _local_gram(self) -> Tensor:
        """What this process adds to M, on the device of its gradients."""
        found = []
        for (counted, mesh), shards in self._shards.items():
            found.append(counted * self._gram_of(shards))
            if mesh is not None:
                self._check_copies(found[-1].cpu(), mesh)
        if self._sums is not None:
            of_slices = ops.gram_where_it_is(self._sums.slices, self._plan)
            found.append(self._processes.size**-2.0 * of_slices)
        if self._said_to_agree:
            found.append(self._agreed() / self._processes.size)
        M = torch.zeros(self._objectives, self._objectives, dtype=torch.float64)
        for part in found:
            M = M.to(part.device) + part
        return M

    def _gram_of(self, touched: Touched) -> Tensor:
        """The Gram matrix of what lies here, where it is; products that were kept are not taken."""
        return ops.gram_where_it_is(here(touched).grads, self._plan, known_products(touched))

    def _agreed(self) -> Tensor:
        """The Gram matrix of gradients that all processes have alike; on the CPU."""
        M = ops.gram(self._said_to_agree, self._plan)
        if not (self._several and self._guarded):
            return M
        known = M.nan_to_num(torch.inf)
        largest, smallest = self._processes.largest(torch.stack([known, -known]))
        _refuse_unlike(largest, -smallest)
        mean: Tensor = (largest - smallest) / 2
        return mean

    def _check_copies(self, own: Tensor, mesh: DeviceMesh) -> None:
        """Raise unless those who hold the same shards, in meshes of their own, have one Gram."""
        place = 0
        for at, size in zip(mesh.get_coordinate() or (), mesh.shape, strict=True):
            place = place * size + at
        table = own.new_zeros(self._processes.size, 1 + own.numel())
        table[self._processes.rank] = torch.cat([own.new_tensor([place]), own.reshape(-1)])
        table = self._processes.sum(table)
        for place in range(mesh.size()):
            rows = table[table[:, 0] == place][:, 1:]
            _refuse_unlike(rows.amax(0).view_as(own), rows.amin(0).view_as(own))

    def _are_own(self, params: Sequence[Tensor]) -> tuple[bool, bool]:
        """Whether replicas' gradients are still to be averaged, or said to be averages.

        Asked of all processes.
        """
        stand_ins = [p.grad for p in params if not is_dtensor(p)]
        kinds = {isinstance(g, ObjectiveGrad) and g.unreduced is not None for g in stand_ins}
        own, said = self._processes.agree(lambda: [True in kinds, False in kinds], 2)
        if own and said:
            raise RuntimeError(
                "some gradients of this step are from backward(losses), which leaves them to be "
                "averaged over processes by step(), and others from `with objective(name):`, where "
                "whoever wraps the model averages them; use one of both between two zero_grad()"
            )
        return own, said


def _refuse_unlike(largest: Tensor, smallest: Tensor) -> None:
    """Raise RuntimeError where Gram matrices of what should be the same gradients differ."""
    norms = largest.diagonal().sqrt()
    apart = (largest - smallest) / torch.outer(norms, norms)
    if bool((apart > _ALIKE).any()):
        raise RuntimeError(
            f"the gradients of replicas must be the same on all processes, and their inner "
            f"products differ by {float(apart.nan_to_num(0.0).max()):.1e} of their size: nobody "
            f"has averaged them. DistributedDataParallel averages one backward pass for each "
            f"forward pass, so of objectives that share one only the first. Use backward(losses), "
            f"which averages all objectives, with or without such a wrapper; or run the wrapped "
            f"model once for each `with objective(name):`. Shards of tensor parallelism are "
            f"averaged over the data by fully_shard on the other dimension of their mesh. "
            f"Independent runs: process_group=None, or the group of each"
        )


def check_settings(settings: object, processes: Processes) -> None:
    """Raise RuntimeError, on all processes, unless they have the same settings."""
    if not processes.alike(torch.tensor([_code(settings)], dtype=torch.float64)):
        _refuse(settings)


def _refuse(settings: object) -> NoReturn:
    raise RuntimeError(
        f"the settings of the optimizer must be the same on all processes, and are not; here they "
        f"are {settings}; set them alike, or give independent runs process_group=None"
    )


def _code(settings: object) -> int:
    """20 bits, so that sums of squares over processes are exact in float64."""
    return zlib.crc32(repr(settings).encode()) >> 12


def _placed(group: Touched) -> Touched:
    """The same with every gradient placed like its parameter."""
    params, grads = group
    placed = [
        [None if g is None else placed_like(g, p) for g, p in zip(one, params, strict=True)]
        for one in grads
    ]
    return Touched(params, placed)


def _touched_anywhere(groups: Sequence[Touched], processes: Processes) -> list[Touched]:
    """The same without parameters that no objective touches on any process."""
    flags = [[any(g is not None for g in c) for c in zip(*g.grads, strict=True)] for g in groups]
    here = torch.tensor([flag for of_group in flags for flag in of_group], dtype=torch.int32)
    anywhere = iter(processes.largest(here).tolist())
    found = []
    for params, grads in groups:
        kept = [bool(next(anywhere)) for _ in params]
        found.append(
            Touched(list(compress(params, kept)), [list(compress(one, kept)) for one in grads])
        )
    return found


def _combined_shards(p: DTensor, column: Sequence[Tensor | None], coefficients: Tensor) -> Tensor:
    part = torch.empty_like(local(p), requires_grad=False)
    ops.combine([[None if g is None else local(g)] for g in column], coefficients, [part])
    return from_local(part, p)
