"""Names and shapes of the parameters of real models, in the order of `model.named_parameters()`.

From the numbers of the published configs, so that no file, network or import of transformers is
needed; `tests/bench/test_bench.py` compares them with transformers' models on the meta device.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

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

    def config(self) -> dict[str, Any]:
        """Arguments of its class of config in transformers, all but the number of layers."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.head,
            "tie_word_embeddings": self.tied,
        }

    def shapes(self) -> Shapes:
        """Parameter name -> shape."""
        d, queries, keys = self.hidden, self.heads * self.head, self.key_value_heads * self.head
        layer: Shapes = {f"self_attn.{x}_proj": (keys, d) for x in "qkv"}
        layer |= {"self_attn.q_proj": (queries, d), "self_attn.o_proj": (d, queries)}
        if self.query_norm:
            layer |= {f"self_attn.{x}_norm": (self.head,) for x in "qk"}
        layer |= {f"mlp.{x}_proj": (self.intermediate, d) for x in ("gate", "up")}
        layer |= {"mlp.down_proj": (d, self.intermediate)}
        around = ("pre_feedforward", "post_feedforward") if self.outer_norms else ()
        layer |= {f"{x}_layernorm": (d,) for x in ("input", "post_attention", *around)}
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
    "Qwen3-32B": Architecture(151936, 5120, 25600, 64, 64, 8, 128, tied=False, query_norm=True),
    "Llama-3-70B": Architecture(128256, 8192, 28672, 80, 64, 8, 128, tied=False),
}
SMALL = {
    "Llama-50M": Architecture(16000, 768, 2048, 6, 12, 4, 64, tied=True),
    "Llama-8M": Architecture(4096, 384, 1024, 4, 6, 2, 64, tied=True),
    "tiny": Architecture(90, 36, 40, 2, 9, 3, 4, tied=True),
}
LISTS: dict[str, Shapes] = {
    **{name: model.shapes() for name, model in (MODELS | SMALL).items()},
    # Next to no work on the device: what is left is the work of the host.
    "300 small": {f"{k}": (64,) for k in range(300)},
}


def elements(shapes: Shapes) -> int:
    return sum(map(prod, shapes.values()))
