"""`Reduced`: the gradients of one step, summed over processes as far as a step needs them.

    shards of DTensors        whoever sharded the model has summed them; local products are summed
    replicas, one's own       slices of their sums; see `distributed/replicas.py`
    replicas, said to agree   by a wrapper, inside of `objective(name)`: held against each other

On one process nothing is sent, and the gradients are what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raco_fast.backends import ops
from raco_fast.backends.plan import Plan
from raco_fast.backends.types import Metric
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
from raco_fast.distributed.replicas import ReplicaSums, flat_of
from raco_fast.gradients.agreement import code_of, refuse_settings, refuse_unlike
from raco_fast.gradients.objective_grad import ObjectiveGrad, Touched, here, joined, known_products
from raco_fast.gradients.second_moments import SecondMoments, metric_of, numbers_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

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
        self._replicas: list[Tensor] = []
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
        self._replicas = list(compress(params, replicas))
        of_replicas = [list(compress(one, replicas)) for one in grads]
        if own:
            self._sums = ReplicaSums(self._replicas, of_replicas, processes)
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
        self,
        numbers: Sequence[Tensor],
        settings: Callable[[], object],
        moments: SecondMoments | None = None,
    ) -> tuple[Tensor, list[float]]:
        """The Gram matrix of the averages over processes, and the values of some numbers.

        Args:
            numbers: one element each, a GradScaler's.
            settings: what a step depends on besides gradients; the same on all processes.
            moments: of the parameters, whose metric is wanted too.
        Returns:
            ([m, m] float64 on the CPU, means of the numbers over the processes): the same bits on
            all of them. With `moments` [2, m, m], the second one in their metric.
        Raises:
            RuntimeError: replicas have other gradients, or processes other settings; on all.
        """
        if self._whole:
            touched = joined(self.groups)
            if moments is not None:
                return ops.together(self._gram_of(touched, moments), numbers)
            return ops.gram_beside(touched.grads, numbers, self._plan, known_products(touched))
        M = self._local_gram(moments)
        code = code_of(settings())
        numbers = [M.new_tensor([code, code**2]), *(x.reshape(1).to(M) for x in numbers)]
        # With another metric a process has another number of matrices: only when all are known to
        # have the same settings the second one is sent.
        summed, (total, square, *values) = self._summed(M[0], numbers)
        # W Σ code² = (Σ code)² only if all are equal; every process has the same sums.
        if self._processes.size * square != total**2:
            refuse_settings(settings())
        if moments is not None:
            summed = torch.stack([summed, self._summed(M[1], [])[0]])
        return summed, [x / self._processes.size for x in values]

    def _summed(self, M: Tensor, numbers: Sequence[Tensor]) -> tuple[Tensor, list[float]]:
        """(Σ M over processes, on the CPU; the sums of the numbers)."""
        upper = torch.triu_indices(*M.shape, device=M.device)
        sums = self._processes.sum(torch.cat([M[upper[0], upper[1]], *numbers])).cpu()
        found, upper = torch.zeros(M.shape, dtype=torch.float64), upper.cpu()
        count = upper.shape[1]
        found[upper[0], upper[1]] = sums[:count]
        found[upper[1], upper[0]] = sums[:count]
        return ops.within_cauchy_schwarz(found), sums[count:].tolist()

    def gram_on_device(self) -> Tensor:
        """M on the gradients' device, not waited for; where `waits` is None."""
        if self._whole:
            return self._gram_of(joined(self.groups), None)
        return ops.within_cauchy_schwarz(self._processes.sum(self._local_gram(None)[0]))

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

    def _local_gram(self, moments: SecondMoments | None) -> Tensor:
        """What this process adds to M [1, m, m], on the device of its gradients.

        With `moments` [2, m, m], the second one in their metric.
        """
        found = []
        for (counted, mesh), shards in self._shards.items():
            found.append(counted * self._gram_of(shards, moments))
            if mesh is not None:
                self._check_copies(_euclidean(found[-1]).cpu(), mesh)
        if self._sums is not None:
            if moments is None:
                of_slices = ops.gram_where_it_is(self._sums.slices, self._plan)
            else:
                of_slices = ops.gram_in_metric(*self._slices_in_metric(moments), self._plan)
            found.append(self._processes.size**-2.0 * of_slices)
        if self._said_to_agree:
            found.append(self._agreed(moments) / self._processes.size)
        matrices = 1 if moments is None else 2
        M = torch.zeros(matrices, self._objectives, self._objectives, dtype=torch.float64)
        for part in found:
            M = M.to(part.device) + part
        return M

    def _gram_of(self, touched: Touched, moments: SecondMoments | None) -> Tensor:
        """The Gram matrix of what lies here, where it is; products that were kept are not taken.

        With `moments` [2, m, m], whatever products were kept: those are Euclidean.
        """
        grads = here(touched).grads
        if moments is not None:
            return ops.gram_in_metric(grads, metric_of(touched.params, moments), self._plan)
        return ops.gram_where_it_is(grads, self._plan, known_products(touched))

    def _slices_in_metric(self, moments: SecondMoments) -> tuple[Lists, Metric]:
        """This process's slices, cut where parameters end, and their metric; nothing is copied."""
        assert self._sums is not None
        of_params = [moments.get(id(p)) for p in self._replicas]
        flat = [None if one is None else flat_of(one.v) for one in of_params]
        grads, places = self._sums.cut()
        parts = [(flat[k], start, stop) for k, start, stop in places]
        vs = [None if v is None else v[start:stop] for v, start, stop in parts]
        return grads, Metric(vs, numbers_of([of_params[k] for k, _, _ in places]))

    def _agreed(self, moments: SecondMoments | None) -> Tensor:
        """The Gram matrix of gradients that all processes have alike; on the CPU."""
        if moments is None:
            M = ops.gram(self._said_to_agree, self._plan)
        else:
            metric = metric_of(self._replicas, moments)
            M = ops.gram_in_metric(self._said_to_agree, metric, self._plan).cpu()
        if self._several and self._guarded:
            known = _euclidean(M).nan_to_num(torch.inf)
            largest, smallest = self._processes.largest(torch.stack([known, -known]))
            refuse_unlike(largest, -smallest)
            _euclidean(M).copy_((largest - smallest) / 2)
        return M

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
            refuse_unlike(rows.amax(0).view_as(own), rows.amin(0).view_as(own))

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


def _euclidean(M: Tensor) -> Tensor:
    """Of [m, m], or of the two that a metric gives: a message that has one size on all processes,
    also on those that have another metric, of which nobody knows yet.
    """
    return M if M.dim() == 2 else M[0]


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
