"""The Gram matrix from the products of single tensors: one order of sums for all who have them."""

import torch
from torch import Tensor


def summed(products: Tensor) -> Tensor:
    """Σ_k P_k of products [n, m, m], float64 [m, m] on the CPU.

    NumPy adds up the first axis term by term: the same bits on every machine, whoever took which
    products and when.
    """
    return torch.from_numpy(products.numpy().sum(axis=0))
