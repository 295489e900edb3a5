"""A reference that follows the policy, against models in float64 that are averaged by hand."""

import copy
import math
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from raco_fast.dpo.data.layout import Layout
from raco_fast.dpo.data.tokenization import EncodedPair
from raco_fast.dpo.losses.margin_losses import LengthDesensitized, Sigmoid
from raco_fast.dpo.models import trainable
from raco_fast.dpo.policy import Policy
from raco_fast.dpo.run.checkpoint import latest
from raco_fast.dpo.run.moving_reference import MovingReference, ReferenceOptions
from raco_fast.dpo.run.places import needed_bytes
from raco_fast.dpo.run.step import PreferenceStep
from raco_fast.dpo.run.trainer import Interrupted, Trainer, train
from raco_fast.dpo.scoring import adapter_off, pair_logps
from raco_fast.engine.prepare import prepare
from raco_fast.optim.clipped_cagrad_adamw import ClippedCAGradAdamW

WEIGHTS = {"x": 0.7, "y": 0.3}
ADAM = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.03}
PAIRS = [
    EncodedPair("p0", [1, 9, 4], [5, 6, 2], [7, 2], {"x": 1, "y": -1}),
    EncodedPair("p1", [1, 8], [5, 2], [9, 9, 7, 2], {"x": -1, "y": 0}),
    EncodedPair("p2", [1, 3, 3, 7], [4, 2], [6, 5, 2], {"x": 1, "y": 1}),
]
LORA = {"lora": {"r": 4, "alpha": 8, "dropout": 0.2}}
AS_TAILS = {"x": Sigmoid(beta=0.3), "y": LengthDesensitized(beta=0.3, alpha=0.4)}


def policy_of(model) -> Policy:
    return Policy(model, None, "the same", "the same", adapter_off)


def score(model, prompt: list[int], response: list[int], tail: float, shorter: int):
    """Of a response, with transformers' own logits."""
    ids = torch.tensor([prompt + response])
    each = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    each = each.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
    return each[:shorter].sum() + tail * each[shorter:].sum()


def losses_by_hand(policy, reference) -> dict[str, torch.Tensor]:
    """DPO for x and LD-DPO for y, as means over the labelled pairs."""
    losses: dict[str, list] = {"x": [], "y": []}
    for pair in PAIRS:
        shorter = min(len(pair.a_ids), len(pair.b_ids))
        for name, of in losses.items():
            if pair.labels[name]:
                r_a, r_b = (
                    score(policy, *of_pair) - score(reference, *of_pair).detach()
                    for of_pair in (
                        (pair.prompt_ids, ids, AS_TAILS[name].tail_weight, shorter)
                        for ids in (pair.a_ids, pair.b_ids)
                    )
                )
                of.append(-torch.nn.functional.logsigmoid(0.3 * pair.labels[name] * (r_a - r_b)))
    return {name: torch.stack(of).mean() for name, of in losses.items()}


@pytest.mark.parametrize(
    ("mode", "kind", "alpha", "every"),
    [
        ("one_backward", "packed", 0.4, 2),
        pytest.param("gram_first", "padded", 0.05, 1, marks=pytest.mark.slow),
        pytest.param("autograd", "padded", 1.0, 2, marks=pytest.mark.slow),
    ],
)
def test_steps_are_those_of_a_second_model_that_is_averaged_by_hand(
    make_model, mode, kind, alpha, every
):
    model = make_model()
    truth, behind = (copy.deepcopy(model).double() for _ in range(2))
    if mode != "autograd":
        prepare(model, strict=True)
    optimizer = ClippedCAGradAdamW(
        model.parameters(), weights=WEIGHTS, rule="linear", max_grad_norm=None, **ADAM
    )
    moving = MovingReference(policy_of(model), ReferenceOptions(every, alpha), (1.0, 0.4), 64)
    layout = Layout(kind, 3 if mode == "gram_first" else 2, math.inf, 0)
    learn = PreferenceStep(model, optimizer, moving, AS_TAILS, layout, mode=mode)
    adamw = torch.optim.AdamW(truth.parameters(), **ADAM)
    for step in range(1, 6):
        result, expected = learn(PAIRS), losses_by_hand(truth, behind)
        adamw.zero_grad()
        sum(WEIGHTS[name] * loss for name, loss in expected.items()).backward()
        adamw.step()
        moving.after(step)
        if step % every == 0:
            for r, p in zip(behind.parameters(), truth.parameters(), strict=True):
                r.data = alpha * p.detach() + (1 - alpha) * r
        for name, loss in expected.items():
            assert float(result.losses[name]) == pytest.approx(loss.item(), rel=2e-5)
    assert moving.syncs(5) == 5 // every
    named = zip(moving.weights.items(), behind.parameters(), strict=True)
    for (_, ours), theirs in named:
        torch.testing.assert_close(ours.double(), theirs.detach(), rtol=1e-4, atol=1e-6)
    changed = [not torch.equal(moving.weights[n], p) for n, p in trainable(model).items()]
    assert any(changed)


def test_a_mean_of_bfloat16_weights_does_not_stand_still(make_model):
    """0.01 of a change of 1/64 is less than bfloat16 can add to a weight."""
    model = make_model().bfloat16()
    moving = MovingReference(policy_of(model), ReferenceOptions(1, 0.01), (1.0,), 64)
    begun = {name: p.detach().double() for name, p in trainable(model).items()}
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 1 / 64)
    own = {name: p.detach().clone() for name, p in trainable(model).items()}
    expected = {n: 0.01 * own[n].double() + 0.99 * begun[n] for n in own}
    moving.after(1)
    for name, weight in moving.weights.items():
        assert weight.dtype is torch.float32
        torch.testing.assert_close(weight.double(), expected[name], rtol=1e-6, atol=1e-9)
    moved = [not torch.equal(weight.double(), begun[n]) for n, weight in moving.weights.items()]
    assert all(moved)
    batch = Layout("padded", 3, math.inf, 0).batch(PAIRS)
    (known,) = moving.logps([batch])
    assert all(torch.equal(p, own[name]) for name, p in trainable(model).items())
    with torch.no_grad():
        for name, p in trainable(model).items():
            p.copy_(expected[name])
        expected_logps = pair_logps(model, batch, 64)
    torch.testing.assert_close(
        torch.cat(known[1.0].of(batch.ids, batch.tokens_a.device)),
        expected_logps,
        rtol=1e-3,
        atol=0.05,
    )


def test_what_was_interrupted_leaves_the_policy(make_model, monkeypatch):
    model = make_model()
    moving = MovingReference(policy_of(model), ReferenceOptions(1, 0.5), (1.0,), 64)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    own = model.lm_head.weight.detach().clone()

    def stop(*_):
        assert not torch.equal(model.lm_head.weight, own)
        raise KeyboardInterrupt

    model.model.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        moving.logps([Layout("padded", 3, math.inf, 0).batch(PAIRS)])
    assert torch.equal(model.lm_head.weight, own)


@pytest.mark.parametrize(
    "lora", [pytest.param(None, marks=pytest.mark.slow), {"r": 4, "alpha": 8}], ids=["full", "lora"]
)
def test_a_reference_that_is_the_policy_makes_every_loss_ln_2(runs, make_config, lora):
    """Held-out pairs are compared with the reference of the beginning."""
    options = ReferenceOptions(sync_steps=1, mixup_alpha=1.0)
    config = make_config(
        {"lora": lora, "dropout": False}, reference=options, epochs=1, batching="padded"
    )
    last = train(config)
    for record in runs.steps(config):
        assert record["loss/sure"] == pytest.approx(math.log(2), abs=1e-6)
        assert record["reference/syncs"] == record["step"]
    first = runs.evaluations(config)[0]
    assert first["eval_loss/sure"] == pytest.approx(math.log(2), rel=1e-6)
    assert abs(last["eval_rewards/margins/sure"]) > 1e-3
    assert (
        "Every step the reference became 1 of the policy"
        in (config.folder / "model" / "README.md").read_text()
    )


@pytest.fixture
def adapter(tiny, tmp_path):
    """A LoRA adapter on the tiny model."""
    config = LoraConfig(r=3, target_modules=["q_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config)
    for p in trainable(model).values():
        torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    return {"name": str(tmp_path / "adapter"), "tokenizer": str(tiny)}


WAYS = {
    "full": ({}, 0.3),
    "lora": (LORA, 1.0),
    "from the base": ({"reference": "base"}, 1.0),
    "reference": ({"adapter": "reference"} | LORA, 1.0),
}


@pytest.mark.parametrize(
    "way", ["full", *(pytest.param(w, marks=pytest.mark.slow) for w in [*WAYS][1:])]
)
def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(
    runs, make_config, monkeypatch, tmp_path, adapter, way
):
    """Stopped before the first update of the reference and after it."""
    model, alpha = WAYS[way]
    begins = adapter if way in ("from the base", "reference") else {}
    options = ReferenceOptions(sync_steps=3, mixup_alpha=alpha)
    whole, cut = (
        make_config(begins | model, reference=options, output_dir=str(tmp_path / n), epochs=1)
        for n in ("whole", "cut")
    )
    runs.interrupt_after(monkeypatch, None)
    train(whole)
    for stop, resume in ((2, False), (2, True)):
        runs.interrupt_after(monkeypatch, stop)
        with pytest.raises(Interrupted):
            train(cut, resume=resume)
        kept = (latest(cut.folder / "checkpoints") / "reference.safetensors").exists()
        assert kept == (resume or way in ("full", "lora"))
    runs.interrupt_after(monkeypatch, None)
    train(cut, resume=True)
    runs.assert_same_run(whole, cut)
    one, two = (
        load_file(latest(c.folder / "checkpoints") / "reference.safetensors") for c in (whole, cut)
    )
    runs.assert_equal(one, two)
    assert one.keys() == runs.weights(whole).keys()
    assert any(not torch.equal(one[n], w) for n, w in runs.weights(whole).items())


def test_an_adapters_reference_is_first_its_own_and_then_a_copy_of_the_policy(
    make_config, adapter, tmp_path
):
    of = make_config(
        adapter | {"adapter": "reference", "dropout": False, "lora": {"r": 4, "alpha": 8}},
        reference=ReferenceOptions(sync_steps=2, mixup_alpha=1.0),
        max_steps=3,
        warmup_ratio=0.0,
        eval_data=[],
    )
    runner = Trainer(of)
    batch = runner.layout.batch(runner.pairs[:3])
    moving, model = runner.references, runner.model
    with torch.no_grad(), runner.inputs.policy.as_reference(model):
        known = pair_logps(model.eval(), batch, 64)

    def reference() -> torch.Tensor:
        return torch.cat(moving.logps([batch])[0][1.0].of(batch.ids, known.device))

    torch.testing.assert_close(reference(), known, rtol=1e-6, atol=1e-5)
    at_two: list[torch.Tensor] = []
    after = moving.after

    def watched(step: int) -> None:
        torch.testing.assert_close(reference(), known, rtol=1e-6, atol=1e-5)
        after(step)
        if step == 2:
            at_two.append(pair_logps(model, batch, 64).detach())

    moving.after = lambda step: watched(step) if step <= 2 else after(step)
    runner.run()
    torch.testing.assert_close(reference(), at_two[0], rtol=1e-6, atol=1e-5)
    assert (pair_logps(model.eval(), batch, 64) - at_two[0]).abs().max() > 1e-3


def test_what_is_refused(make_config, adapter):
    for given, message in (
        ({"sync_steps": 0}, r"`reference.sync_steps` must be at least 1, got 0; leave `ref"),
        ({"mixup_alpha": 0.0}, r"`reference.mixup_alpha` must be in \(0, 1\], got 0.0; 1 makes"),
        ({"mixup_alpha": 1.1}, r"`reference.mixup_alpha` must be in \(0, 1\], got 1.1"),
    ):
        with pytest.raises(ValueError, match=message):
            ReferenceOptions(**given)
    refused = partial(pytest.raises, ValueError, match=r"must be 1 where an adapter is trained")
    with refused():
        make_config(LORA, reference=ReferenceOptions())
    with refused():
        Trainer(make_config(adapter, reference=ReferenceOptions()))
    merged = make_config(adapter | {"adapter": "merge"}, reference=ReferenceOptions())
    assert Trainer(merged).state.reference is not None


def test_a_checkpoints_room_has_the_reference_in_it():
    parameters = [torch.nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))]
    assert needed_bytes(parameters, "stochastic", True) == (2000, 6000 + 4000)
