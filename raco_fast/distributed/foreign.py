"""Parameters whose gradients other libraries keep where a step cannot see them."""

from collections.abc import Iterable

from torch import Tensor

_CURE = "shard the model with fully_shard (FSDP2), whose parameters are DTensors"


def refuse_foreign(params: Iterable[Tensor]) -> None:
    """Raise RuntimeError, with the cure, for parameters of FSDP1 or of DeepSpeed's ZeRO stage 3."""
    for p in params:
        if getattr(p, "_is_flat_param", False) or type(p).__name__ == "FlatParameter":
            raise RuntimeError(
                f"a parameter is a FlatParameter of FullyShardedDataParallel (FSDP1), which keeps "
                f"one gradient and other shards on every process; {_CURE}"
            )
        if hasattr(p, "ds_tensor"):
            raise RuntimeError(
                f"a parameter of shape {list(getattr(p, 'ds_shape', p.shape))} is partitioned by "
                f"DeepSpeed's ZeRO stage 3, which gathers it for one backward pass of its own; use "
                f"stage 2 or lower with raco_fast.gram_first(..., backward=engine.backward), or "
                f"{_CURE}"
            )
