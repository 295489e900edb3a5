"""Products that a backward pass has kept: they are those of what the buffers hold, or not used."""

import copy

import pytest
import torch
from torch import Tensor, nn

import raco_fast
from raco_fast import ClippedCAGradAdamW
from raco_fast.backends import cpu, ops
from raco_fast.backends.plan import Plan
from raco_fast.engine import contributions, light_tap
from raco_fast.gradients import products_of_pass
from raco_fast.gradients.pass_count import PassCount

WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}
SEQUENCES, LENGTH, WIDTH, VOCABULARY = 4, 20, 40, 80


class Scored(nn.Module):
    """A score per sequence, through every kind of parameter; `tied`: one of them is used twice."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.inner, self.outer = nn.Linear(WIDTH, 66), nn.Linear(66, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = x + self.outer(torch.tanh(self.inner(self.norm(x))))
        logps = self.head(x).log_softmax(-1)
        return logps.gather(-1, ids.roll(-1, 1)[..., None]).sum((1, 2)) / LENGTH


def batch(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), generator=generator)


def losses_of(scores: Tensor, names=tuple(WEIGHTS)) -> dict[str, Tensor]:
    losses = {
        "a": -nn.functional.logsigmoid(scores).sum(),
        "b": (scores - 1).square().sum(),
        "c": scores[0] - scores[1],
    }
    return {name: losses[name] for name in names}


@pytest.fixture(autouse=True)
def reads(monkeypatch) -> list[int]:
    """How many elements every call has read for their products alone."""
    found, plain = [], cpu.products

    def counted(grads, built):
        found.append(sum(g.numel() for one in grads for g in one if g is not None))
        return plain(grads, built)

    monkeypatch.setattr(cpu, "products", counted)
    return found


@pytest.fixture(autouse=True)
def small_matrices_as_large_ones(monkeypatch) -> None:
    monkeypatch.setattr(contributions, "_FEW", 0)
    monkeypatch.setattr(light_tap, "_FEW_ROWS", -1)


class Loop:
    """A prepared model and its optimizer.

    `read`: the elements that its last pass, or its last step, has read for their products alone.
    """

    def __init__(self, reads: list[int], tied: bool = False, **options) -> None:
        self.model, self.read, self._reads = Scored(tied), 0, reads
        raco_fast.prepare(self.model, strict=True, check_every=None)
        options = {"lr": 1e-2, "weight_decay": 0.1, "c": 0.4, "weights": WEIGHTS, **options}
        self.opt = ClippedCAGradAdamW(self.model.parameters(), **options)

    def backward(self, seed: int = 0, factor: float = 1.0, names=tuple(WEIGHTS), **options) -> None:
        scores = self.model(batch(seed))
        losses = {name: factor * loss for name, loss in losses_of(scores, names).items()}
        self._reads.clear()
        self.opt.backward(losses, scores=scores, **options)
        self.read = sum(self._reads)

    def step(self) -> Tensor:
        """The step's Gram matrix."""
        self._reads.clear()
        self.opt.step()
        self.read = sum(self._reads)
        return torch.as_tensor(self.opt.solution.gram)

    @property
    def params(self) -> list[Tensor]:
        return list(self.model.parameters())

    @property
    def columns(self) -> list[list[Tensor | None]]:
        """The m gradients of each parameter, looked at without the optimizer's knowledge."""
        return [p.grad.buffers for p in self.params if p.grad is not None]

    def sizes(self) -> int:
        return sum(g.numel() for column in self.columns for g in column if g is not None)


def exact(columns: list[list[Tensor | None]]) -> Tensor:
    """The Gram matrix in float64."""
    M = torch.zeros(len(WEIGHTS), len(WEIGHTS), dtype=torch.float64)
    for column in columns:
        like = next(g for g in column if g is not None)
        rows = [torch.zeros_like(like) if g is None else g for g in column]
        G = torch.stack([row.double().flatten() for row in rows])
        M += G @ G.T
    return M


def assert_of_the_buffers(M: Tensor, columns: list[list[Tensor | None]]) -> None:
    """The Gram of what they hold, and to the bit the one that nothing was kept for."""
    truth = exact(columns)
    norms = truth.diagonal().sqrt()
    assert ((M - truth).abs() <= 2 * 2.0**-24 * torch.outer(norms, norms)).all()
    assert torch.equal(M, ops.gram([list(one) for one in zip(*columns, strict=True)]))


@pytest.fixture
def loop(reads) -> Loop:
    return Loop(reads)


@pytest.mark.parametrize("together", [1, 4000, 1 << 20])
@pytest.mark.parametrize("tied", [False, True])
def test_a_step_reads_nothing_for_its_gram(monkeypatch, reads, tied, together):
    monkeypatch.setattr(products_of_pass, "_TOGETHER", together)
    loop = Loop(reads, tied)
    for seed in range(2):
        loop.backward(seed)
        # Those of matrices that are used once came with the loop that writes them.
        matrices = [loop.model.inner.weight, loop.model.outer.weight]
        matrices += [] if tied else [loop.model.head.weight]
        assert loop.read == loop.sizes() - 3 * sum(p.numel() for p in matrices)
        columns = [[g.clone() for g in column] for column in loop.columns]
        M = loop.step()
        assert loop.read == 0
        assert_of_the_buffers(M, columns)
        loop.opt.zero_grad()


def test_a_step_does_not_depend_on_what_was_kept(reads):
    kept, not_kept = Loop(reads), Loop(reads)
    not_kept.opt.gradients.passes.begin = lambda: False
    for seed in range(3):
        for loop in (kept, not_kept):
            loop.backward(seed)
            loop.step()
            assert loop.read == (0 if loop is kept else loop.sizes())
            loop.opt.zero_grad()
    for p, q in zip(kept.params, not_kept.params, strict=True):
        assert torch.equal(p, q)


def poke(write):
    """A change of the first objective's gradient at one matrix, whose products are kept."""

    def change(loop: Loop) -> None:
        write(loop.model.inner.weight.grad)

    return change


def handed_out(write):
    """The same through what `of` hands out."""

    def change(loop: Loop) -> None:
        write(loop.opt.gradients.of(loop.model.inner.weight)["a"])

    return change


def replace_storage(held) -> None:
    held.buffers[0].data = held.buffers[0] * 2


def replace_buffer(held) -> None:
    held.buffers[0] = held.buffers[0] * 2


def exchange(loop: Loop) -> None:
    loop.model.inner.weight.grad = copy.deepcopy(loop.model.inner.weight.grad)
    loop.model.inner.weight.grad.buffers[0].data.mul_(2)


def unscale(loop: Loop) -> None:
    found, inverse = torch.zeros(1), torch.tensor([0.5])
    grads = [p.grad for p in loop.params]
    torch._amp_foreach_non_finite_check_and_unscale_(grads, found, inverse)


def write_in_block(write):
    def change(loop: Loop) -> None:
        with loop.opt.objective("a"):
            write(loop.model.inner.weight.grad)

    return change


def held_from_before(loop: Loop) -> None:
    """A tensor that was handed out before the pass that is the step's last one."""
    loop.opt.zero_grad(set_to_none=False)
    g = loop.opt.gradients.of(loop.model.inner.weight)["a"]
    loop.backward(1)
    g.numpy()[...] *= 2


CHANGES = {
    "in place": poke(lambda held: held.buffers[0].mul_(2)),
    "a view": poke(lambda held: held.buffers[0].view(-1)[3:9].mul_(8)),
    "another objective's": poke(lambda held: held.buffers[2].neg_()),
    "all of them": poke(lambda held: held.buffers[0]._base.mul_(2)),
    "foreach": poke(lambda held: torch._foreach_mul_(held.present, 2.0)),
    "out=": poke(lambda held: torch.add(held.buffers[0], 1, out=held.buffers[0])),
    "set_": poke(lambda held: held.buffers[0].set_(held.buffers[0] * 2)),
    "data = ": poke(replace_storage),
    "another buffer": poke(replace_buffer),
    "none": poke(lambda held: held.buffers.__setitem__(0, None)),
    "zero_": poke(lambda held: held.zero_()),
    "foreach zero": poke(lambda held: torch._foreach_zero_([held])),
    "another stand-in": exchange,
    "of: in place": handed_out(lambda g: g.mul_(2)),
    "of: .data": handed_out(lambda g: g.data.mul_(2)),
    "of: numpy": handed_out(lambda g: g.numpy().fill(2.0)),
    "of: DLPack": handed_out(lambda g: torch.from_dlpack(g).mul_(2)),
    "of: below the count": handed_out(
        lambda g: torch._amp_foreach_non_finite_check_and_unscale_(
            [g], torch.zeros(1), torch.tensor([0.5])
        )
    ),
    "of, before the pass": held_from_before,
    "in a block": write_in_block(lambda grad: grad.mul_(2)),
    "in a block: .data": write_in_block(lambda grad: grad.data.mul_(2)),
    "in a block: p.grad": write_in_block(lambda grad: grad.data.clamp_(-0.01, 0.01)),
    "GradScaler": unscale,
    "more of an objective": lambda loop: loop.backward(1, mode="autograd"),
    "another pass": lambda loop: loop.backward(1),
    "shared memory": lambda loop: (
        loop.model.share_memory(),
        loop.model.inner.weight.grad.buffers[0].data.mul_(2),
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_products_of_what_has_changed_are_not_used(loop, change):
    loop.backward()
    before = exact(loop.columns)
    change(loop)
    assert not torch.allclose(before, exact(loop.columns), rtol=1e-4)
    columns = loop.columns
    M = loop.step()
    assert_of_the_buffers(M, columns)
    changed = 3 * loop.model.inner.weight.numel()
    assert loop.read in (changed, changed * 2 // 3, loop.sizes())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_converted_model(loop, dtype):
    loop.backward()
    loop.model.to(dtype)
    columns = loop.columns
    assert_of_the_buffers(loop.step(), columns)
    assert loop.read == loop.sizes()


def test_reading_leaves_them_to_be_taken_anew_there_alone(loop):
    loop.backward()
    loop.opt.gradients.of(loop.model.inner.weight)
    loop.step()
    assert loop.read == 3 * loop.model.inner.weight.numel()


def test_the_order_of_the_writers_does_not_matter(loop):
    """Layers that are written again after their products were taken, and a use that is missing."""
    loop.backward(0, names=("a", "b", "c"))
    loop.opt.step()
    loop.backward(1)  # on top of the gradients of before
    columns = loop.columns
    assert_of_the_buffers(loop.step(), columns)


def test_micro_batches_are_read_once(reads):
    loop = Loop(reads)
    for number in range(3):
        in_passes = []
        for seed in range(8):
            loop.backward(seed, factor=1 / 8)
            in_passes.append(loop.read)
        columns = loop.columns
        M = loop.step()
        assert_of_the_buffers(M, columns)
        # The first step does not know that it has eight passes: it takes those of the first one in
        # vain. Later ones take those of the last.
        assert loop.read == (loop.sizes() if number == 0 else 0)
        assert [read > 0 for read in in_passes] == [k == (7 if number else 0) for k in range(8)]
        loop.opt.zero_grad()


def test_eight_micro_batches_are_one_batch(reads):
    loop, joined = Loop(reads), Loop(reads)
    for model in (loop.model, joined.model):
        model.double()
    for _ in range(2):
        for seed in range(8):
            loop.backward(seed)
        M = loop.step()
        scores = joined.model(torch.cat([batch(seed) for seed in range(8)]))
        parts = [losses_of(part) for part in scores.split(SEQUENCES)]
        losses = {name: sum(part[name] for part in parts) for name in WEIGHTS}
        joined.opt.backward(losses, scores=scores)
        torch.testing.assert_close(joined.step(), M, rtol=1e-10, atol=1e-10)
        assert (loop.read, joined.read) == (0 if _ else loop.sizes(), 0)
        loop.opt.zero_grad()
        joined.opt.zero_grad()


def test_an_objective_that_is_left_out(reads):
    loop = Loop(reads, weights={"a": 0.6, "b": 0.4, "c": 0.0})
    loop.backward(names=("a", "b"))
    columns = [[*column[:2], None] for column in loop.columns]
    M = loop.step()
    assert_of_the_buffers(M, columns)
    assert not M[2].any()


def test_grad_scaler(reads):
    scaled, plain = Loop(reads), Loop(reads)
    for unscaled_first in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        scores = scaled.model(batch(0))
        losses = {name: scaler.scale(loss) for name, loss in losses_of(scores).items()}
        scaled.opt.backward(losses, scores=scores)
        if unscaled_first:
            scaler.unscale_(scaled.opt)
        reads.clear()
        scaler.step(scaled.opt)
        read = sum(reads)
        plain.backward(0)
        M = plain.step()
        # What the step unscales by itself is not written, so that the kept products serve.
        assert read == (scaled.sizes() if unscaled_first else 0)
        torch.testing.assert_close(torch.as_tensor(scaled.opt.solution.gram), M)
        for loop in (scaled, plain):
            loop.opt.zero_grad()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_step_along_what_is_not_finite_is_skipped(loop, bad):
    before = [p.detach().clone() for p in loop.params]
    loop.backward(factor=bad)
    M = loop.step()
    assert loop.read == 0
    assert not M.isfinite().all()
    assert loop.opt.skipped_steps == 1
    for p, q in zip(loop.params, before, strict=True):
        assert torch.equal(p, q)


def test_a_copy_of_the_optimizer_between_pass_and_step(reads):
    loop, alone = Loop(reads), Loop(reads)
    loop.backward()
    alone.backward()
    assert loop.read > 0
    model, opt = copy.deepcopy((loop.model, loop.opt))
    loop.step()
    alone.step()
    assert loop.read == 0
    scores = model(batch(0))
    opt.backward(losses_of(scores), scores=scores)
    opt.step()
    for p, q, r in zip(loop.params, alone.params, model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


def test_a_backend_that_is_forced_for_the_step_alone_takes_its_own(loop):
    loop.backward()
    columns = loop.columns
    with raco_fast.backend("reference"):
        M = loop.step()
        assert torch.equal(M, ops.gram([list(one) for one in zip(*columns, strict=True)]))
    assert loop.read == 0  # by C++


def test_gram_first_keeps_none(loop):
    loop.backward(mode="gram_first")
    assert loop.read == 0
    assert all(type(p.grad) is Tensor for p in loop.params)
    loop.step()
    assert loop.read == sum(p.numel() for p in loop.params)  # the one direction


def test_passes_that_a_step_is_made_of():
    count = PassCount()
    assert [count.begin() for _ in range(3)] == [True, False, False]
    count.stepped()
    assert [count.begin() for _ in range(4)] == [False, False, True, False]
    count.forget()  # zero_grad without a step tells nothing
    assert [count.begin() for _ in range(3)] == [False, False, True]
    count.stepped()
    count.stepped()  # a second step along the same gradients
    assert [count.begin() for _ in range(3)] == [False, False, True]


@pytest.mark.parametrize("last", [True, False])
def test_only_on_the_cpu_it_is_a_matter_of_history_which_products_are_kept(last):
    """There the bits do not depend on it; a GPU's kernel is asked in every pass."""
    p, far = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, device="meta"))
    products = products_of_pass.ProductsOfPass({p: 1, far: 1}, Plan(), last)
    assert products.completed_by_next(p) == last
    assert products.completed_by_next(far)
    shared = products_of_pass.ProductsOfPass({far: 2}, Plan(), last)
    assert not shared.completed_by_next(far)
