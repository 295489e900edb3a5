"""Per-layer rules: how the parameters of a layer get their gradients from its input and dY.

A rule is a function

    rule(module, x, dy, segments) -> {parameter name: Use}

with x the layer's first argument, dy the gradient of its output and `Use` what this call of the
layer adds to a parameter's gradients (`contributions.py`). A rule must hold for every row on its
own: the table is for layers that do not mix rows. `register_layer_rule` adds
one.

Many models bring their own RMSNorm, GPT-2 its own Linear and Gemma its own Embedding. They are
recognised by what they compute, on a few random rows, not by their names.
"""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raco_fast.backends.weight_grad import widened
from raco_fast.engine.contributions import LookupUse, Use, matrix_use, vector_use
from raco_fast.engine.sequences import Segments

LayerRule = Callable[[Any, Tensor, Tensor, Segments], Mapping[str, Use]]


def linear(module: Any, x: Tensor, dy: Tensor, segments: Segments) -> dict[str, Use]:
    """y = x Wᵀ + b."""
    return {"weight": matrix_use(x, dy, segments), **_bias(module, dy, segments)}


def conv1d(module: Any, x: Tensor, dy: Tensor, segments: Segments) -> dict[str, Use]:
    """y = x W + b: GPT-2's Linear, with its weight transposed."""
    return {"weight": matrix_use(dy, x, segments), **_bias(module, dy, segments)}


def embedding(
    module: Any, ids: Tensor, dy: Tensor, segments: Segments, scale: float = 1.0
) -> dict[str, Use]:
    """y = scale W[ids]."""
    ids, dy = segments.arranged(ids[..., None]), segments.arranged(dy)
    return {"weight": LookupUse(ids, dy, segments, scale, module.padding_idx)}


def layer_norm(module: Any, x: Tensor, dy: Tensor, segments: Segments) -> dict[str, Use]:
    """y = w (x - mean x) / √(var x + ε) + b, also with 1 + w in place of w."""
    normed = F.layer_norm(widened(x), module.weight.shape, eps=_eps(module, x))
    return _norm(module, normed, dy, segments)


def rms_norm(module: Any, x: Tensor, dy: Tensor, segments: Segments) -> dict[str, Use]:
    """y = w x / √(mean x² + ε), also with 1 + w in place of w."""
    normed = F.rms_norm(widened(x), module.weight.shape, eps=_eps(module, x))
    return _norm(module, normed, dy, segments)


def _norm(module: Any, normed: Tensor, dy: Tensor, segments: Segments) -> dict[str, Use]:
    return {"weight": vector_use(normed.mul_(dy), segments), **_bias(module, dy, segments)}


def _bias(module: Any, dy: Tensor, segments: Segments) -> dict[str, Use]:
    own = module._parameters  # an attribute of a module is looked for in several places
    return {} if own.get("bias") is None else {"bias": vector_use(dy, segments)}


def _eps(module: Any, x: Tensor) -> float:
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
    # torch takes the default of the dtype it computes in, not of x.
    return torch.finfo(widened(x[:0]).dtype).eps if eps is None else float(eps)


_RULES: dict[type, LayerRule] = {
    nn.Linear: linear,
    nn.Embedding: embedding,
    nn.LayerNorm: layer_norm,
    nn.RMSNorm: rms_norm,
}
_OURS = frozenset(_RULES.values())


def register_layer_rule(module_type: type[nn.Module], rule: LayerRule) -> None:
    """Give layers of a type a rule; it holds for subclasses that keep the type's `forward`.

    Args:
        module_type: a layer that owns parameters and treats every row on its own.
        rule: see the module's docstring. `raco_fast.verify` compares it with autograd.
    Raises:
        TypeError: `module_type` is not a class of modules, or `rule` cannot be called.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"`module_type` must be a subclass of nn.Module, got {module_type!r}")
    if not callable(rule):
        raise TypeError(f"`rule` must be a function (module, x, dy, segments), got {rule!r}")
    _RULES[module_type] = rule


def register_rule(module_type: type[nn.Module], rule: LayerRule) -> None:
    """The name that `register_layer_rule` had before there were combination rules."""
    warnings.warn(
        "raco_fast.register_rule is called raco_fast.register_layer_rule now",
        DeprecationWarning,
        stacklevel=2,
    )
    register_layer_rule(module_type, rule)


def rule_for(module: nn.Module) -> LayerRule | None:
    """The rule of a layer that owns parameters, for the mode it is in; None if there is none."""
    if "forward" in vars(module):
        return None  # a replaced forward may compute anything
    if any(p.is_complex() for p in module.parameters(recurse=False)):
        return None  # the gradient of a complex weight has a conjugate, which the rules leave out
    for cls in type(module).__mro__:
        if cls in _RULES and type(module).forward is cls.forward:  # type: ignore[attr-defined]
            rule = _RULES[cls]
            return rule if rule not in _OURS or _is_plain(module) else None
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return None
    # Autocast around the call must not change the comparison, and the comparison must not use up
    # random numbers of the training run.
    devices = [weight.device] if weight.is_cuda else []
    with torch.random.fork_rng(devices), torch.autocast(weight.device.type, enabled=False):
        return _recognised(module)


def _is_plain(module: nn.Module) -> bool:
    """Whether a layer of torch has none of the options that our rules leave out."""
    if not {name for name, _ in module.named_parameters()} <= {"weight", "bias"}:
        return False  # of weight_norm and its like
    if isinstance(module, nn.Embedding):
        return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return len(module.normalized_shape) == 1
    return True


@torch.no_grad()
def _recognised(module: Any) -> LayerRule | None:
    """A rule for a layer that computes what a known one does, judged by random rows."""
    own = dict(module.named_parameters())
    weight = own.get("weight")
    if weight is None or not set(own) <= {"weight", "bias"}:
        return None
    if isinstance(module, nn.Embedding) and _is_plain(module):
        return _scaled_embedding(module)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        # float32: bfloat16 is too coarse to tell norms apart, and many compute no finer.
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(weight.device)

    if weight.ndim == 1 and (hasattr(module, "eps") or hasattr(module, "variance_epsilon")):
        # Rows with a mean tell RMSNorm from LayerNorm, rows as small as ε where ε is added.
        x = random(2, 3, len(weight)) + 1
        parameters = {name: random(*p.shape) for name, p in own.items()}
        x[:, 0] *= _eps(module, x) ** 0.5
        w, b = parameters["weight"], parameters.get("bias", 0.0)
        for rule, norm in ((rms_norm, F.rms_norm), (layer_norm, F.layer_norm)):
            normed = norm(x, weight.shape, eps=_eps(module, x))
            if _agrees(module, parameters, x, w * normed + b, (1 + w) * normed + b):
                return rule
        return None
    if weight.ndim == 2 and "bias" in own and own["bias"].shape == weight.shape[1:]:
        x, w, b = random(2, 3, len(weight)), random(*weight.shape), random(weight.shape[1])
        return conv1d if _agrees(module, {"weight": w, "bias": b}, x, x @ w + b) else None
    return None


def _scaled_embedding(module: nn.Embedding) -> LayerRule | None:
    # In the weight's own dtype, to which models round the scale; a few rows say enough.
    ids = torch.arange(max(8, 1 + (module.padding_idx or 0)), device=module.weight.device)[None]
    table = torch.randn(
        ids.shape[1], module.embedding_dim, generator=torch.Generator().manual_seed(0)
    )
    table = table.to(module.weight)
    ones = _output(module, {"weight": torch.ones_like(table)}, ids)
    if ones is None:
        return None
    scale = float(ones.flatten()[0])
    same = bool((ones == scale).all()) and _agrees(
        module, {"weight": table}, ids, table[ids] * scale
    )
    return partial(embedding, scale=scale) if same else None


def _agrees(
    module: nn.Module, parameters: dict[str, Tensor], x: Tensor, *candidates: Tensor
) -> bool:
    y = _output(module, parameters, x)
    return y is not None and any(
        y.shape == c.shape
        and float((y - c).abs().max()) <= 32 * torch.finfo(y.dtype).eps * float(c.abs().max())
        for c in candidates
    )


def _output(module: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor | None:
    """What the layer makes of x; None if it wants other arguments, for then it is another layer."""
    # A twin, because other threads may be using the module.
    twin = object.__new__(type(module))
    vars(twin).update(vars(module), _parameters={**module._parameters, **parameters})
    try:
        y = type(twin).forward(twin, x)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError):
        return None
    return y if isinstance(y, Tensor) and y.is_floating_point() else None
