"""Tiny models with sizes that do not divide evenly, and the ways to lay one over processes."""

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from raco_fast.dpo.models import enable_checkpointing

VOCABULARY = 61
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "intermediate_size": 47,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "attn_implementation": "sdpa",  # "eager" has its softmax in float32
}


class Scorer(nn.Module):
    """The log-probability of each sequence, from `forward`: what DDP and FSDP2 wrap."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, ids: Tensor) -> Tensor:
        """[B] from [B, T] ids; the first two tokens are the prompt."""
        logits = self.lm(input_ids=ids, use_cache=False).logits[:, :-1]
        logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return logps[:, 1:].sum(-1)

    @property
    def blocks(self) -> list[nn.Module]:
        """What is sharded apart."""
        return list(self.lm.get_decoder().layers)


class Block(nn.Module):
    """A norm and a two-layer perceptron beside a residual connection."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] to the same."""
        return x + self.down(self.up(self.norm(x)).tanh())


class Perceptron(nn.Module):
    """A language model for tensor parallelism, which sees the last token only.

    No plan of tensor parallelism touches `final`: its parameters stay ordinary replicas.
    """

    def __init__(self, plain_layer: bool, width: int = 12, inner: int = 18) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, inner) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.final = nn.Linear(1, 1) if plain_layer else nn.Identity()

    def forward(self, ids: Tensor) -> Tensor:
        """[B] from [B, T] ids."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))[:, :-1]
        logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return self.final(logps.sum(-1, keepdim=True)).sum(-1)


@cache
def _built(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    if "perceptron" in name:
        return Perceptron("plain layer" in name).to(dtype)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**LLAMA, tie_word_embeddings="tied" in name)
    lm = LlamaForCausalLM(config)
    for module in list(lm.modules()):
        for key, norm in module.named_children():
            if type(norm).__name__ == "LlamaRMSNorm":  # computes in float32, whatever its dtype
                setattr(module, key, nn.RMSNorm(config.hidden_size, config.rms_norm_eps))
    if "lora" in name:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "v_proj", "up_proj"]
        lm = get_peft_model(
            lm, LoraConfig(r=5, lora_alpha=8, target_modules=targets, init_lora_weights=False)
        )
    if "checkpointed" in name:
        enable_checkpointing(lm.get_decoder())
    return Scorer(lm).to(dtype)


def build(name: str = "llama", dtype: torch.dtype = torch.float64) -> Any:
    """A model whose `forward` gives [B] scores of [B, T] ids, the same at every call.

    Args:
        name: "perceptron", "perceptron with a plain layer", or "llama" with any of "tied", "lora"
            and "checkpointed" in it.
    """
    return copy.deepcopy(_built(name, dtype)).train()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require grad, by their names without DDP's prefix."""
    named = model.named_parameters()
    return {n.removeprefix("module."): p for n, p in named if p.requires_grad}


def whole(p: Tensor) -> Tensor:
    """A copy of a parameter with all its shards put together."""
    p = p.detach()
    return p.full_tensor() if isinstance(p, DTensor) else p.clone()


DDP: dict[str, dict[str, bool]] = {
    "ddp": {},
    "ddp, buckets": {"gradient_as_bucket_view": True},
    "ddp, unused": {"find_unused_parameters": True},
    "ddp, static": {"static_graph": True},
}


def laid_out(model: Any, how: str) -> nn.Module:
    """The model over all processes.

    Args:
        how: "replicas" (as it is; "alone" and "pair": with a batch for each process or each two),
            a key of `DDP`, "fsdp2", "hsdp" (2 x W / 2), "tp", or "fsdp x tp" (W / 2 x 2).
    """
    world, device = dist.get_world_size(), next(model.parameters()).device.type
    if how in DDP:
        return DistributedDataParallel(model, **DDP[how])
    if how == "fsdp2":
        _shard(model, init_device_mesh(device, (world,)))
    elif how == "hsdp":
        _shard(model, init_device_mesh(device, (2, world // 2), mesh_dim_names=("copy", "shard")))
    elif how == "tp":
        _cut(model, init_device_mesh(device, (world,)))
    elif how == "fsdp x tp":
        mesh = init_device_mesh(device, (world // 2, 2), mesh_dim_names=("data", "tensor"))
        _cut(model, mesh["tensor"])
        _shard(model, mesh["data"])
    else:
        assert how in ("replicas", "alone", "pair"), how
    return model


def data_rank(how: str) -> tuple[int, int]:
    """(which share of the batch is this process's, number of shares)."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if how in ("tp", "alone"):
        return 0, 1
    if how == "pair":
        return rank % 2, 2
    return (rank // 2, world // 2) if how == "fsdp x tp" else (rank, world)


def _shard(model: Any, mesh: Any) -> None:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _cut(model: Any, mesh: Any) -> None:
    """Tensor parallelism with norms on pieces of the sequence, whose gradients are `Partial`."""
    plan: dict[str, Any] = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    for k in range(len(model.blocks)):
        plan |= {
            f"blocks.{k}.norm": SequenceParallel(),
            f"blocks.{k}.up": ColwiseParallel(input_layouts=Shard(1)),
            f"blocks.{k}.down": RowwiseParallel(output_layouts=Shard(1)),
        }
    parallelize_module(model, mesh, plan)
