"""Inner products of long rows, in float32 as far as that is exact enough."""

import torch
from torch import Tensor

from raco_fast.backends.weight_grad import blocks

# Products that are added in float32.
_RUN = 1024


def products(a: Tensor, b: Tensor | None = None) -> Tensor:
    """⟨a_g, b_h⟩ of the rows of a and b (else a) [groups, n], float64 on their device.

    How one product adds up long rows depends on the machine: half a million numbers were off by
    2e-5. In float32 only runs of `_RUN` are added, which costs about as much.
    """
    b = a if b is None else b
    runs = a.shape[1] // _RUN
    whole = runs * _RUN
    of_a, of_b = (t[:, :whole].view(len(t), runs, _RUN).transpose(0, 1) for t in (a, b))
    K = torch.bmm(of_a, of_b.transpose(1, 2)).sum(0, dtype=torch.float64)
    return K.add_(a[:, whole:] @ b[:, whole:].T)


def products_within(a: Tensor, each: int, b: Tensor | None = None) -> Tensor:
    """`products` of so many consecutive rows among themselves: [rows / each, each, each]."""
    whole = a.shape[1] // _RUN * _RUN
    if each == 1 and b is None:  # in one reading
        runs = a[:, :whole].reshape(len(a), -1, _RUN)
        squares: Tensor = torch.linalg.vector_norm(runs, dim=2).double().square_().sum(1)
        if whole < a.shape[1]:
            squares += torch.linalg.vector_norm(a[:, whole:], dim=1).double().square_()
        return squares.view(-1, 1, 1)
    b = a if b is None else b
    found = [products(a[start:stop], b[start:stop]) for start, stop in blocks(len(a), each)]
    return torch.stack(found) if found else a.new_zeros(0, each, each, dtype=torch.float64)
