"""Random gradients and weights of a parameter list, and what the right answers are.

The truth is float64 and written another way than any rival: the Gram chunk by chunk, the AdamW step
at some elements of every tensor (it is elementwise once the coefficients are known), so that a
rival is checked on the very tensors it is timed on, however large.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Tensors = list[Tensor]

ADAMW = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
STEPS_BEFORE = 5  # so that the moments matter: a first step is lr * sign(G0), whatever G0's length
GRADIENT_SCALE = 1e-3
_CHUNK = 1 << 22
_PROBED = 64


def random_like(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device, seed: int
) -> Tensors:
    """One gradient: normal numbers of size `GRADIENT_SCALE`."""
    return fill([torch.empty(s, dtype=dtype, device=device) for s in shapes], GRADIENT_SCALE, seed)


@torch.no_grad()
def fill(tensors: Tensors, scale: float, seed: int) -> Tensors:
    """Overwrite with normal numbers, the same for the same seed."""
    generator = torch.Generator(tensors[0].device).manual_seed(seed)
    for t in tensors:
        t.normal_(0.0, scale, generator=generator)
    return tensors


def exact_gram(grads: Sequence[Tensors]) -> Tensor:
    """[m, m] float64 on the CPU: products and sums in float64."""
    m = len(grads)
    M = torch.zeros(m, m, dtype=torch.float64, device=grads[0][0].device)
    for column in zip(*grads, strict=True):
        flat = [g.view(-1) for g in column]
        for start in range(0, flat[0].numel(), _CHUNK):
            G = torch.stack([f[start : start + _CHUNK].double() for f in flat])
            M += G @ G.T
    return M.cpu()


def gram_error(M: Tensor, truth: Tensor) -> float:
    """max |M_ij - truth_ij| / (‖g_i‖‖g_j‖)."""
    norms = truth.diagonal().sqrt()
    return float(((M - truth).abs() / torch.outer(norms, norms)).max())


class Weights:
    """Parameters with the state of AdamW, and torch's fused AdamW on the same memory.

    Args:
        params: n parameters.
        exp_avgs, exp_avg_sqs: their n states each.
        steps: n scalar tensors, the step counts of whoever else steps these parameters.
    """

    def __init__(self, params: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, steps: Tensors):
        self.params, self.exp_avgs, self.exp_avg_sqs = params, exp_avgs, exp_avg_sqs
        self.steps = steps
        self.theirs = [nn.Parameter(p.detach()) for p in params]  # another .grad, the same memory
        self.adamw = torch.optim.AdamW(self.theirs, **ADAMW, fused=True)
        for q, m, v in zip(self.theirs, exp_avgs, exp_avg_sqs, strict=True):
            step = torch.zeros((), device=q.device)
            self.adamw.state[q] = {"step": step, "exp_avg": m, "exp_avg_sq": v}

    @torch.no_grad()
    def restart(self) -> None:
        """Everything as after `STEPS_BEFORE` steps, the same every time."""
        fill(self.params, 0.02, seed=101)
        fill(self.exp_avgs, GRADIENT_SCALE, seed=102)
        fill(self.exp_avg_sqs, GRADIENT_SCALE, seed=103)
        torch._foreach_mul_(self.exp_avg_sqs, self.exp_avg_sqs)
        for step in [*self.steps, *(s["step"] for s in self.adamw.state.values())]:
            step.fill_(float(STEPS_BEFORE))

    def step_of_adamw(self, grads: Sequence[Tensor]) -> None:
        for q, g in zip(self.theirs, grads, strict=True):
            q.grad = g
        self.adamw.step()
        self.adamw.zero_grad()

    def stepped(self, grads: Sequence[Tensors], alpha: Tensor) -> tuple[Tensor, Tensor]:
        """(before, after) one step from here along G0 = Σ α_i g_i, at the probed elements."""
        p, m, v = map(probed, (self.params, self.exp_avgs, self.exp_avg_sqs))
        (beta1, beta2), t = ADAMW["betas"], STEPS_BEFORE + 1
        g = torch.stack([probed(one) for one in grads]).T @ alpha
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g.square()
        change = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + ADAMW["eps"])
        return p, p - ADAMW["lr"] * (change + ADAMW["weight_decay"] * p)


def probed(tensors: Sequence[Tensor]) -> Tensor:
    """The first and last few elements of every tensor, float64 on the CPU."""
    flat = [t.detach().view(-1) for t in tensors]
    return torch.cat([e for f in flat for e in (f[:_PROBED], f[-_PROBED:])]).double().cpu()
