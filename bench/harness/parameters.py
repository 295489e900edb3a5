"""Names and shapes of the parameters of real models, in the order of `model.named_parameters()`.

From the numbers of the published configs, so that no file, network or import of transformers is
needed; `tests/bench/test_bench.py` compares them with transformers' models on the meta device.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Architecture:
    """A decoder of the Llama family.

    `query_norm` adds Qwen 3's norms of queries and keys, `outer_norms` Gemma 3's around the MLP.
    """

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head: int
    tied: bool
    query_norm: bool = False
    outer_norms: bool = False

    def shapes(self) -> Shapes:
        """Parameter name -> shape."""
        d, queries, keys = self.hidden, self.heads * self.head, self.key_value_heads * self.head
        layer: Shapes = {
            "self_attn.q_proj": (queries, d),
            "self_attn.k_proj": (keys, d),
            "self_attn.v_proj": (keys, d),
            "self_attn.o_proj": (d, queries),
            **({"self_attn.q_norm": (self.head,)} if self.query_norm else {}),
            **({"self_attn.k_norm": (self.head,)} if self.query_norm else {}),
            "mlp.gate_proj": (self.intermediate, d),
            "mlp.up_proj": (self.intermediate, d),
            "mlp.down_proj": (d, self.intermediate),
            "input_layernorm": (d,),
            "post_attention_layernorm": (d,),
            **({"pre_feedforward_layernorm": (d,)} if self.outer_norms else {}),
            **({"post_feedforward_layernorm": (d,)} if self.outer_norms else {}),
        }
        found: Shapes = {"model.embed_tokens.weight": (self.vocabulary, d)}
        for i in range(self.layers):
            found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        found["model.norm.weight"] = (d,)
        if not self.tied:
            found["lm_head.weight"] = (self.vocabulary, d)
        return found


MODELS = {
    "SmolLM2-135M": Architecture(49152, 576, 1536, 30, 9, 3, 64, tied=True),
    "Qwen3-0.6B": Architecture(151936, 1024, 3072, 28, 16, 8, 128, tied=True, query_norm=True),
    "Qwen3-4B": Architecture(151936, 2560, 9728, 36, 32, 8, 128, tied=True, query_norm=True),
    "Gemma3-4B": Architecture(
        262208, 2560, 10240, 34, 8, 4, 256, tied=True, query_norm=True, outer_norms=True
    ),
    "Llama-3-8B": Architecture(128256, 4096, 14336, 32, 32, 8, 128, tied=False),
}
OTHERS: dict[str, Shapes] = {
    "Llama-50M": Architecture(16000, 768, 2048, 6, 12, 4, 64, tied=True).shapes(),
    "tiny": Architecture(97, 24, 40, 2, 3, 1, 8, tied=False, query_norm=True).shapes(),
    # Next to no work on the device: what is left is the work of the host.
    "300 small": {f"{k}": (64,) for k in range(300)},
}
LISTS: dict[str, Shapes] = {name: model.shapes() for name, model in MODELS.items()} | OTHERS


def elements(shapes: Shapes) -> int:
    """The number of parameters."""
    return sum(map(prod, shapes.values()))
