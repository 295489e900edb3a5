"""`Products`: the inner products of one parameter's m gradients, taken when those were written.

The Gram matrix of a step is their sum over the parameters. Taken while a layer's gradients are
still in a cache, or in registers, they spare the step a reading of all of them. On the CPU the bits
are the same, so that it does not matter which step found which products kept. On a GPU they are the
same to rounding, and `ProductsOfPass` sees to it that equal steps keep equal ones.

Products that no longer fit would be silently wrong, so they are used only for the very tensors that
they were taken of, at the same address and of the same version, the count that torch adds one to
whenever a tensor is written. What that count does not show drops them instead:

    zeroing and GradScaler's unscaling of a stand-in   `ObjectiveGrad` drops them
    gradients that somebody else holds                 none are kept: `.data`, a numpy array or
                                                       DLPack write without a count
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from raco_fast.backends.choose import forced
from raco_fast.distributed.dtensor import local


class Products(NamedTuple):
    """⟨g_i, g_j⟩ of one parameter, and what they were taken of.

    Attributes:
        values: [m, m] float64 on the gradients' device.
        backend: which one was forced when they were taken.
        gradients: the m gradients.
        marks: their addresses and versions.
    """

    values: Tensor
    backend: str | None
    gradients: tuple[Tensor, ...]
    marks: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, gradients: Sequence[Tensor], values: Tensor) -> "Products":
        """Those of what the gradients hold now."""
        return cls(values, forced(), tuple(gradients), tuple(map(_mark, gradients)))

    def are_of(self, gradients: Sequence[Tensor | None]) -> bool:
        """Whether these are the same gradients, and nobody has written to them since."""
        for g, of_before, mark in zip(gradients, self.gradients, self.marks, strict=True):
            if g is not of_before or _mark(g) != mark:
                return False
        return self.backend == forced()


def _mark(g: Tensor) -> tuple[int, int, int]:
    """What changes when a gradient is written: of a DTensor, by itself or by its local part."""
    part = local(g)
    return part.data_ptr(), part._version, g._version
