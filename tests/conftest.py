"""Fixtures shared by the whole suite."""

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from raco_fast.engine import light_tap
from raco_fast.engine.declaration import sequences
from raco_fast.gradients.objective_gradients import ObjectiveGradients

settings.register_profile("raco", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("raco")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--tap-functions`: the layers of tests are so small that all would have light taps."""
    parser.addoption("--tap-functions", action="store_true", help="leave no light taps")


def pytest_configure(config: pytest.Config) -> None:
    """Keep tests off the network and on one thread, the processes that they start as well.

    Looking for a model takes minutes where there is no network. Threads wait for one another where
    something else runs on the cores, such as other tests: a forward pass took 12 times as long.
    OMP_NUM_THREADS=n asks for n; tests of threads use `with_threads`.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, which is later
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
    if config.getoption("--tap-functions"):
        light_tap._FEW_ROWS = -1


@pytest.fixture
def with_threads() -> Iterator[Callable[[int, Callable[[], Any]], Any]]:
    """A function that calls another with torch on n threads: `with_threads(n, call)`."""
    before = torch.get_num_threads()

    def run(n: int, call: Callable[[], Any]) -> Any:
        torch.set_num_threads(n)
        return call()

    yield run
    torch.set_num_threads(before)


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and oracles beside the checkout; skips where there is none."""
    folder = ROOT.parent / "shared"
    if not (folder / "oracle").is_dir():
        pytest.skip("no ../shared folder beside the checkout (data and oracle are not distributed)")
    return folder


VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # the library's 0.02 makes layers so small that errors hide
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
BIASED = {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZES),
    "llama, tied, biased": ("Llama", SIZES | BIASED),
    "qwen3": ("Qwen3", SIZES | {"tie_word_embeddings": True}),
    "gemma3": ("Gemma3Text", SIZES | {"sliding_window": 6, "query_pre_attn_scalar": 6}),
    "gpt2": ("GPT2", GPT2),
}


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    """Every architecture in turn."""
    return request.param


def build(
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    adapter: str | None = None,
    attention: str = "eager",
    **changes: Any,
) -> nn.Module:
    """A tiny causal LM whose parameters are nothing special; `adapter`: "lora" or "saved".

    It is built once a run; every call gets a copy, and a generator that knows nothing of it.
    """
    key = repr((family, dtype, adapter, attention, changes))
    if key not in _BUILT:
        model = initialized(family, attention, changes)
        _BUILT[key] = adapted(model.to(dtype), adapter)
    torch.manual_seed(1)
    return copy.deepcopy(_BUILT[key])


_BUILT: dict[str, nn.Module] = {}


def initialized(family: str, attention: str, changes: dict[str, Any]) -> nn.Module:
    import transformers

    name, values = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**values | changes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p), alpha=0.3)
    return model


def adapted(model: nn.Module, adapter: str | None, dropout: float = 0.0) -> nn.Module:
    if adapter is None:
        return model
    import peft

    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        lora_dropout=dropout,
        target_modules="all-linear",
        modules_to_save=["lm_head", "embed_tokens"] if adapter == "saved" else None,
        fan_in_fan_out=model.config.model_type == "gpt2",
    )
    model = peft.get_peft_model(model, config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.2)
    return model


def make_batch(rows: int = 8, longest: int = 9) -> SimpleNamespace:
    """Right-padded rows of unequal length with unequal prompts."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (rows, longest), generator=generator)
    length = torch.randint(5, longest + 1, (rows, 1), generator=generator)
    length[1] = longest
    place = torch.arange(longest)
    mask = place < length
    scored = mask & (place >= torch.randint(1, 4, (rows, 1), generator=generator))
    return SimpleNamespace(ids=ids.masked_fill(~mask, 0), mask=mask, scored=scored)


def scores_by_logits(model: nn.Module, batch: SimpleNamespace) -> Tensor:
    """[B] from all logits of the padded batch."""
    out = model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False)
    logps = _wide(out.logits[:, :-1]).log_softmax(-1)
    logps = logps.gather(-1, batch.ids[:, 1:, None])[..., 0]
    return logps.masked_fill(~batch.scored[:, 1:], 0).sum(-1)


def scores_by_head(model: nn.Module, batch: SimpleNamespace) -> Tensor:
    """[B] through the head that cuts the vocabulary."""
    from raco_fast.dpo.logps import sequence_logps

    return sequence_logps(model, batch.ids, batch.mask.long(), batch.scored, chunk_tokens=7)


def scores_packed(model: nn.Module, batch: SimpleNamespace) -> Tensor:
    """[B] from one row of tokens without padding, each sequence blind to the others."""
    length = batch.mask.sum(1)
    of_token = torch.arange(len(length), device=length.device).repeat_interleave(length)
    place = batch.mask.nonzero()[:, 1]
    window = getattr(model.config, "sliding_window", None) or len(place)
    back = place[:, None] - place
    seen = (of_token[:, None] == of_token) & (back >= 0) & (back < window)
    ids, dtype = batch.ids[batch.mask], next(model.parameters()).dtype
    blind = torch.zeros(1, 1, *seen.shape, dtype=dtype, device=seen.device)
    blind.masked_fill_(~seen, torch.finfo(dtype).min)
    with sequences(cu_seqlens=[0, *length.cumsum(0).tolist()]):
        out = model(
            input_ids=ids[None], position_ids=place[None], attention_mask=blind, use_cache=False
        )
    logps = _wide(out.logits[0, :-1]).log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    scored = batch.scored[batch.mask][1:]
    return logps.new_zeros(len(length)).index_add(0, of_token[1:][scored], logps[scored])


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


LAYOUTS = {"logits": scores_by_logits, "head": scores_by_head, "packed": scores_packed}


@pytest.fixture(params=LAYOUTS)
def layout(request) -> Callable[[nn.Module, SimpleNamespace], Tensor]:
    """Every way from a batch to scores in turn."""
    return LAYOUTS[request.param]


def make_losses(scores: Tensor, m: int = 3, *, without_pair: int | None = None) -> list[Tensor]:
    """m objectives of adjacent pairs: DPO, IPO and SFT losses, each on labels of its own.

    Objective `without_pair` has nothing in this batch: its loss is a constant.
    """
    margins = 0.2 * (scores[0::2] - scores[1::2])
    generator = torch.Generator().manual_seed(5)
    losses = []
    for i in range(m):
        labels = torch.randint(-1, 2, (len(margins),), generator=generator)
        labels[i % len(labels)] = 1
        labels = labels.to(margins.device)
        labelled = labels.abs().sum()
        if i == without_pair:
            loss = torch.tensor(0.25)
        elif i % 3 == 0:
            loss = -((0.5 + i / 8) * labels * margins).sigmoid().log().mul(labels.abs()).sum()
        elif i % 3 == 1:
            loss = (labels * margins - 0.5).square().mul(labels.abs()).sum()
        else:
            loss = -torch.where(labels > 0, scores[0::2], scores[1::2]).sum() / 5
        losses.append(loss / labelled)
    return losses


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def by_autograd(model: nn.Module, losses: list[Tensor]) -> dict[str, Tensor]:
    """Parameter name -> [m, *shape] float64, from one autograd.grad for each loss."""
    params = trained(model)
    columns = []
    for loss in losses:
        grads: Any = [None] * len(params)
        if loss.requires_grad:
            grads = torch.autograd.grad(
                loss, list(params.values()), retain_graph=True, allow_unused=True
            )
        columns.append(grads)
    return {
        name: torch.stack([torch.zeros_like(p) if g is None else g for g in grads]).double()
        for (name, p), grads in zip(params.items(), zip(*columns, strict=True), strict=True)
    }


def in_float64(model: nn.Module, run: Callable[[nn.Module], list[Tensor]]) -> dict[str, Tensor]:
    """`by_autograd` on a double copy of a model that was never prepared: the truth."""
    oracle = copy.deepcopy(model).double()
    return by_autograd(oracle, run(oracle))


def held(gradients: ObjectiveGradients, model: nn.Module) -> dict[str, Tensor]:
    """What `gradients` holds, as `by_autograd` gives it."""
    return {
        name: torch.stack(
            [torch.zeros_like(p) if g is None else g for g in gradients.of(p).values()]
        ).double()
        for name, p in trained(model).items()
    }


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Largest relative error over the objectives, for each parameter."""
    assert found.keys() == truth.keys()
    result = {}
    for name, exact in truth.items():
        size, error = (g.flatten(1).norm(dim=1) for g in (exact, found[name] - exact))
        assert not error[size == 0].any(), name
        result[name] = float((error / size)[size > 0].max())
    return result


@pytest.fixture(scope="session")
def lm() -> SimpleNamespace:
    """Tiny language models, batches and losses, and the truth about their gradients."""
    return SimpleNamespace(
        build=build,
        adapted=adapted,
        batch=make_batch,
        by_logits=scores_by_logits,
        by_head=scores_by_head,
        packed=scores_packed,
        losses=make_losses,
        trained=trained,
        by_autograd=by_autograd,
        in_float64=in_float64,
        held=held,
        errors=errors,
        weights=lambda m: {f"o{i}": (i + 1) / (m * (m + 1) / 2) for i in range(m)},
    )
