"""The chunked head against a full log-softmax, over the families of logits there are."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from raco_fast.dpo.logps import sequence_logps
from raco_fast.dpo.models import enable_checkpointing

VOCAB, WIDTH = 211, 32
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # the library's 0.02 gives logits near 0, which hide a missing scale
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": WIDTH,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
FAMILIES = {
    "llama": ("Llama", BASE),
    "llama, tied": ("Llama", BASE | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", BASE),
    "gemma2, softcapped": ("Gemma2", BASE | {"final_logit_softcapping": 4.0}),
    "gemma3": ("Gemma3Text", BASE | {"sliding_window": 16}),
    "gemma3, softcapped": ("Gemma3Text", BASE | {"final_logit_softcapping": 4.0}),
    "gpt2": ("GPT2", GPT2),
    "granite": ("Granite", BASE | {"logits_scaling": 3.0}),
    "cohere": ("Cohere", {k: v for k, v in BASE.items() if k != "head_dim"} | {"logit_scale": 0.3}),
    "phi, biased head": ("Phi", {k: v for k, v in BASE.items() if k != "head_dim"}),
}


def make_model(family: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    name, settings = FAMILIES[family]
    torch.manual_seed(7)
    config = getattr(transformers, f"{name}Config")(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if family.startswith("phi"):
        nn.init.normal_(model.lm_head.bias)
    return model.to(dtype).eval()


def make_batch(rows: int = 6, longest: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded rows of unequal length with unequal prompts."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (rows, longest), generator=generator)
    length = torch.randint(6, longest + 1, (rows, 1), generator=generator)
    length[0] = longest
    place = torch.arange(longest)
    attention = place < length
    scored = attention & (place >= torch.randint(1, 5, (rows, 1), generator=generator))
    return ids.masked_fill(~attention, 0), attention.long(), scored


def full_logps(model: nn.Module, ids: Tensor, attention: Tensor, scored: Tensor) -> Tensor:
    """Every logit at once, in the model's dtype, log-softmax in at least float32."""
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    logps = wide.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return logps.masked_fill(~scored[:, 1:], 0).sum(-1)


def value_and_gradient(logps: Tensor, model: nn.Module) -> tuple[Tensor, Tensor]:
    weights = torch.linspace(-1, 1.5, len(logps), dtype=logps.dtype)
    grads = torch.autograd.grad(
        (weights * logps).sum(), [p for p in model.parameters() if p.requires_grad]
    )
    return logps.detach().double(), torch.cat([g.double().flatten() for g in grads])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_within_twice_the_error_of_plain_torch(family, dtype):
    model = make_model(family, dtype)
    batch = make_batch()
    exact = value_and_gradient(full_logps(oracle := copy.deepcopy(model).double(), *batch), oracle)
    plain = value_and_gradient(full_logps(model, *batch), model)
    ours = value_and_gradient(sequence_logps(model, *batch, chunk_tokens=7), model)
    for truth, theirs, mine in zip(exact, plain, ours, strict=True):
        floor = torch.finfo(torch.float32).eps * truth.norm()
        assert (mine - truth).norm() <= 2 * torch.maximum((theirs - truth).norm(), floor)


class BareDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, **_):
        return SimpleNamespace(last_hidden_state=self.embedding(input_ids))


class BareHead(nn.Module):
    """An embedding and a head: nothing but what this module computes, so fp64 is exact."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.decoder = BareDecoder()
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        nn.init.normal_(self.head.weight, std=0.5)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
        self.to(dtype)

    def get_decoder(self):
        return self.decoder

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.head(self.decoder(input_ids).last_hidden_state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("chunk", [1, 57, 10_000])
def test_the_head_alone_against_fp64_for_any_chunk_size(chunk, dtype):
    model, batch = BareHead(dtype), make_batch(16, 40)
    if dtype == torch.bfloat16 and chunk == 1:
        model.head.requires_grad_(False)  # its gradient is a rounded sum, see the module's head
    oracle = copy.deepcopy(model).double()
    exact = value_and_gradient(full_logps(oracle, *batch), oracle)
    plain = value_and_gradient(full_logps(model, *batch), model)
    ours = value_and_gradient(sequence_logps(model, *batch, chunk_tokens=chunk), model)
    for truth, theirs, mine in zip(exact, plain, ours, strict=True):
        assert (mine - truth).norm() <= 2 * (theirs - truth).norm()


def test_right_padding_changes_nothing():
    model, (ids, attention, scored) = make_model(), make_batch()
    tight = sequence_logps(model, ids, attention, scored)
    wide = [nn.functional.pad(part, (0, 9)) for part in (ids, attention, scored)]
    wide[0][:, -9:] = 17  # what stands in the padding is nobody's business
    torch.testing.assert_close(sequence_logps(model, *wide), tight, rtol=1e-5, atol=1e-5)
    alone = [
        sequence_logps(model, ids[k : k + 1, :n], attention[k : k + 1, :n], scored[k : k + 1, :n])
        for k, n in enumerate(attention.sum(1))
    ]
    torch.testing.assert_close(torch.cat(alone), tight, rtol=1e-5, atol=1e-5)


class LargestLogits(TorchDispatchMode):
    """The most logits in any matrix with a row for each of so many tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.most = tokens, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            rows, *columns = getattr(tensor, "shape", None) or (0,)
            if rows == self.tokens and len(columns) == 1 and columns != [WIDTH]:
                self.most = max(self.most, tensor.numel())
        return result


def test_no_more_logits_exist_than_the_full_rows_of_a_chunk():
    model, batch = make_model(), make_batch(9)
    tokens = int(batch[2].sum())
    assert tokens > 50  # and so unlike every width of the model
    fits = 5 * VOCAB // tokens * tokens  # the vocabulary is cut, for all tokens alike
    with LargestLogits(tokens) as seen:
        sequence_logps(model, *batch, chunk_tokens=5).sum().backward()
    assert seen.most == fits <= 5 * VOCAB
    with LargestLogits(tokens) as seen, torch.no_grad():
        sequence_logps(model, *batch, chunk_tokens=5)
    assert seen.most == fits
    with LargestLogits(tokens) as seen:  # the test sees what it looks for
        sequence_logps(model, *batch, chunk_tokens=tokens)
    assert seen.most == tokens * VOCAB


def with_lora(model: nn.Module, dropout: float = 0.0, **options) -> nn.Module:
    import peft

    torch.manual_seed(11)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_dropout=dropout, target_modules="all-linear", **options
    )
    policy = peft.get_peft_model(model, config)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return policy


def trained_gradients(policy: nn.Module, loss: Tensor, retain: bool = False) -> list[Tensor]:
    trained = [p for p in policy.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, trained, retain_graph=retain))


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_a_lora_adapter_is_part_of_the_model(modules_to_save):
    policy = with_lora(make_model(), modules_to_save=modules_to_save).eval()
    batch = make_batch()
    ours, plain = sequence_logps(policy, *batch, chunk_tokens=9), full_logps(policy, *batch)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-4)
    with policy.disable_adapter(), torch.no_grad():
        assert (sequence_logps(policy, *batch) - ours).abs().min() > 0.1
    mine, theirs = trained_gradients(policy, ours.sum()), trained_gradients(policy, plain.sum())
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_several_backward_passes_share_a_checkpointed_graph_with_dropout(lora):
    """One forward pass and a retained graph give what a forward pass for each loss gives."""
    model = make_model()
    policy = with_lora(model, dropout=0.3) if lora else model
    enable_checkpointing(model)
    policy.train()
    batch, runs = make_batch(), []
    sequence_logps(policy, *batch)  # its first pass looks at the head
    model.get_decoder().layers[1].mlp.register_forward_pre_hook(lambda *_: runs.append(1))

    def forward() -> tuple[Tensor, Tensor]:
        torch.manual_seed(23)
        logps = sequence_logps(policy, *batch, chunk_tokens=6)
        return logps[:3].sum(), logps[2:].square().sum()

    first, second = forward()
    shared = [
        trained_gradients(policy, first, retain=True),
        trained_gradients(policy, second, retain=True),
        trained_gradients(policy, first),
    ]
    assert len(runs) == 4  # once forward, and recomputed in each backward pass
    apart = [trained_gradients(policy, forward()[k]) for k in (0, 1, 0)]
    for ours, theirs in zip(shared, apart, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_rows_without_a_scored_token_are_zero():
    model, (ids, attention, scored) = make_model(), make_batch()
    scored[1] = False
    assert sequence_logps(model, ids, attention, scored)[1] == 0
    assert torch.equal(
        sequence_logps(model, ids, attention, torch.zeros_like(scored)), torch.zeros(len(ids))
    )


def test_errors():
    model, (ids, attention, scored) = make_model(), make_batch()
    with pytest.raises(
        ValueError, match=r"must share one \[B, T\] shape, got \(6, 15\), \(6, 14\)"
    ):
        sequence_logps(model, ids, attention[:, 1:], scored)
    with pytest.raises(ValueError, match="`completion_mask` marks the first token of a row"):
        sequence_logps(model, ids, attention, torch.ones_like(scored))
    with pytest.raises(ValueError, match="`chunk_tokens` must be at least 1, got 0"):
        sequence_logps(model, ids, attention, scored, chunk_tokens=0)
