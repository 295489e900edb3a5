"""Per-objective gradients: whose gradient is where, and what happens when it is somewhere else."""

import copy

import pytest
import torch
from process_group import process_group_of_one
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raco_fast.gradients.objective_grad import ObjectiveGrad
from raco_fast.gradients.objective_gradients import ObjectiveGradients
from raco_fast.optim.clipped_cagrad_adamw import ClippedCAGradAdamW

WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def losses_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    y = model(x)
    return {"a": y[:, 0].sum(), "b": (y[:, 1] - y[:, 0]).square().sum(), "c": y.exp().sum()}


def batch(n: int = 8) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(7))


def expected(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, ...]]:
    params = list(model.parameters())
    losses = losses_of(model, x)
    return {n: torch.autograd.grad(loss, params, retain_graph=True) for n, loss in losses.items()}


def check(gradients: ObjectiveGradients, truth: dict[str, tuple[Tensor, ...]]) -> None:
    for k, p in enumerate(gradients.parameters()):
        of_p = gradients.of(p)
        assert list(of_p) == list(truth)
        for name, grad in of_p.items():
            torch.testing.assert_close(grad, truth[name][k])


def test_backward_with_a_mapping_in_any_order_or_a_sequence():
    model, x = network(), batch()
    truth = expected(model, x)
    for arrange in (dict, lambda d: dict(reversed(d.items())), lambda d: list(d.values())):
        gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
        gradients.backward(arrange(losses_of(model, x)))
        check(gradients, truth)
        gradients.collect()
        gradients.zero()


def test_sequence_weights_name_the_objectives_by_number():
    model, x = network(), batch()
    gradients = ObjectiveGradients(model.parameters(), [0.5, 0.3, 0.2])
    assert gradients.names == ("0", "1", "2")
    gradients.backward(list(losses_of(model, x).values()))
    truth = expected(model, x)
    check(gradients, dict(zip(gradients.names, truth.values(), strict=True)))


def test_micro_batches_add_up():
    model, x = network(), batch()
    truth = expected(model, x)
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    for rows in x.split(2):
        gradients.backward(losses_of(model, rows))
    check(gradients, truth)


def test_own_loops_may_interleave_objectives():
    model, x = network(), batch()
    truth = expected(model, x)
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    for name, rows in [(n, r) for r in x.split(4) for n in ("c", "a", "b")]:
        with gradients.objective(name):
            losses_of(model, rows)[name].backward()
    check(gradients, truth)


def test_autograd_accumulates_in_place_and_hooks_see_the_real_gradient():
    model, x = network(), batch()
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    gradients.backward(losses_of(model, x))
    weight = model[0].weight
    before = gradients.of(weight)["b"].data_ptr()
    seen = []
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(type(p.grad)))
    gradients.backward(losses_of(model, x))
    assert gradients.of(weight)["b"].data_ptr() == before
    assert seen == [Tensor] * 3


def test_untouched_parameters():
    used, unused, only_b = (nn.Parameter(torch.ones(2)) for _ in range(3))
    gradients = ObjectiveGradients([used, unused, only_b], {"a": 0.4, "b": 0.6})
    gradients.backward({"a": used.sum(), "b": (2 * only_b).sum() + used.sum()})
    assert unused.grad is None
    ((params, grads),) = gradients.collect()
    assert params == [used, only_b]
    assert grads[0] == [gradients.of(used)["a"], None]
    assert gradients.of(unused) == {"a": None, "b": None}
    assert gradients.of(only_b)["a"] is None
    assert gradients.of(only_b)["b"].tolist() == [2.0, 2.0]


def test_p_grad_is_handed_back_when_the_block_raises():
    model, x = network(), batch()
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    gradients.backward(losses_of(model, x))
    held = [p.grad for p in model.parameters()]
    lent = []

    def fail() -> None:
        with gradients.objective("b"):
            lent.extend(p.grad for p in model.parameters())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(type(grad) is Tensor for grad in lent)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), held, strict=True))
    check(gradients, expected(model, x))
    with gradients.objective("a"):  # the failed block is closed
        pass


def test_a_failed_block_does_not_count_as_backward():
    model = network()
    gradients = ObjectiveGradients(model.parameters(), {"a": 0.5, "b": 0.5})
    with gradients.objective("a"):
        losses_of(model, batch())["a"].backward()
    with pytest.raises(KeyError), gradients.objective("b"):
        raise KeyError
    with pytest.raises(RuntimeError, match=r"objectives \['b'\] have had no backward pass"):
        gradients.collect()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_whoever_zeroes_p_grad_zeroes_every_objective(set_to_none):
    model, x = network(), batch()
    truth = expected(model, x)
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    for zero in (model.zero_grad, torch.optim.SGD(model.parameters()).zero_grad, gradients.zero):
        gradients.backward(losses_of(model, x))
        zero(set_to_none=set_to_none)
        for p in model.parameters():
            values = list(gradients.of(p).values())
            assert all(g is None if set_to_none else not g.any() for g in values)
        gradients.backward(losses_of(model, x))
        check(gradients, truth)
        gradients.zero()


@pytest.mark.parametrize("foreach", [True, False])
def test_foreach_zero_reaches_every_objective(foreach):
    model = network()
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    gradients.backward(losses_of(model, batch()))
    torch.optim.SGD(model.parameters(), foreach=foreach).zero_grad(set_to_none=False)
    assert not any(g.any() for p in model.parameters() for g in gradients.of(p).values())


def test_zeroing_by_the_model_means_every_objective_must_run_again():
    model = network()
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    gradients.backward(losses_of(model, batch()))
    model.zero_grad()
    with pytest.raises(RuntimeError, match="step without backward"):
        gradients.collect()
    with gradients.objective("a"):
        losses_of(model, batch())["a"].backward()
    with pytest.raises(RuntimeError, match=r"\['b', 'c'\] have had no backward .*0.0 \* scores"):
        gradients.collect()


def test_an_objective_that_touches_nothing_still_counts():
    p, elsewhere = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    gradients = ObjectiveGradients([p], {"a": 0.5, "b": 0.5})
    gradients.backward({"a": elsewhere.sum(), "b": p.sum()})
    gradients.collect()
    assert gradients.of(p)["a"] is None


def test_parameters_are_asked_anew_each_time():
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    current = [first]
    gradients = ObjectiveGradients(lambda: current, {"a": 0.5, "b": 0.5})
    gradients.backward({"a": first.sum(), "b": first.prod()})
    current.append(second)
    gradients.backward({"a": second.sum(), "b": first.sum()})
    assert gradients.of(first)["b"].tolist() == [2.0, 2.0]
    assert gradients.of(second)["a"].tolist() == [1.0, 1.0, 1.0]
    assert gradients.of(second)["b"] is None
    current[:] = [second]  # a wrapper swaps the parameters
    assert gradients.collect()[0].params == [second]


def test_a_parameter_listed_twice_counts_once():
    p = nn.Parameter(torch.ones(2))
    gradients = ObjectiveGradients([p, p], {"a": 0.5, "b": 0.5})
    gradients.backward({"a": p.sum(), "b": 3 * p.sum()})
    assert gradients.parameters() == [p]
    assert gradients.of(p)["b"].tolist() == [3.0, 3.0]


def test_one_objective_keeps_its_gradient_in_p_grad():
    p = nn.Parameter(torch.ones(2))
    gradients = ObjectiveGradients([p], {"only": 1.0})
    gradients.backward({"only": p.sum()})
    p.sum().backward()
    with gradients.objective("only"):
        p.sum().backward()
    gradients.collect()
    assert type(p.grad) is Tensor
    assert p.grad.tolist() == [3.0, 3.0]
    assert gradients.of(p)["only"] is p.grad
    gradients.zero(set_to_none=False)
    assert p.grad.tolist() == [0.0, 0.0]
    gradients.zero()
    assert p.grad is None


def test_gradient_that_is_a_view_of_a_reused_buffer_is_copied_out():
    p, reused = nn.Parameter(torch.ones(2)), torch.zeros(6)
    gradients = ObjectiveGradients([p], {"a": 0.5, "b": 0.5})
    for name, value in (("a", 1.0), ("b", 2.0)):
        with gradients.objective(name):
            reused.fill_(value)
            p.grad = reused[2:4]
    assert gradients.of(p)["a"].tolist() == [1.0, 1.0]
    assert gradients.of(p)["b"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("as_view", [True, False])
def test_distributed_data_parallel(monkeypatch, as_view):
    model, x = network(), batch()
    truth = expected(model, x)
    with process_group_of_one(monkeypatch):
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=as_view)
        gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
        for rows in x.split(4):
            for name in WEIGHTS:
                with gradients.objective(name):
                    losses_of(wrapped, rows)[name].backward()
        check(gradients, truth)


def test_reading_p_grad_as_one_gradient_raises():
    model = network()
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    gradients.backward(losses_of(model, batch()))
    with pytest.raises(
        RuntimeError, match=r"one gradient per objective .* clip with max_grad_norm"
    ):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(RuntimeError, match=r"call loss.backward\(\) inside `with opt.objective"):
        losses_of(model, batch())["a"].backward()
    grad = model[0].bias.grad
    assert isinstance(grad, ObjectiveGrad)
    assert repr(grad) == "ObjectiveGrad(shape=[6], objectives=['a', 'b', 'c'])"


def test_copies_of_plain_tensors_keep_their_gradients_apart():
    p = torch.ones(2, requires_grad=True)
    gradients = ObjectiveGradients([p], {"a": 0.5, "b": 0.5})
    with gradients.objective("b"):
        p.sum().backward()
    twin = copy.deepcopy(p)
    gradients.of(p)["b"].zero_()
    assert gradients.of(twin)["a"] is None
    assert gradients.of(twin)["b"].tolist() == [1.0, 1.0]


def test_gradients_filled_outside_of_an_objective_are_refused():
    model = network()
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    losses_of(model, batch())["a"].backward()
    message = r"shape \[6, 4\] was filled outside of an objective.*zero_grad\(\)"
    with pytest.raises(RuntimeError, match=message):
        gradients.backward(losses_of(model, batch()))
    with pytest.raises(RuntimeError, match=message):
        gradients.collect()
    assert all(type(p.grad) is Tensor for p in model.parameters())


def test_sparse_gradients_outside_of_an_objective_are_refused():
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    gradients = ObjectiveGradients(table.parameters(), {"a": 0.5, "b": 0.5})
    with pytest.raises(RuntimeError, match=r"shape \[5, 2\] was filled outside of an objective"):
        gradients.collect()


def test_gradients_of_other_objectives_are_refused():
    model = network()
    ObjectiveGradients(model.parameters(), WEIGHTS).backward(losses_of(model, batch()))
    other = ObjectiveGradients(model.parameters(), {"x": 0.5, "y": 0.5})
    with (
        pytest.raises(RuntimeError, match=r"holds gradients of .*'c'\), not of \('x', 'y'\)"),
        other.objective("x"),
    ):
        pass


def test_sparse_gradients_are_refused_and_p_grad_survives():
    table = nn.Embedding(5, 2, sparse=True)
    gradients = ObjectiveGradients(table.parameters(), {"a": 0.5, "b": 0.5})
    loss = table(torch.tensor([1, 3])).sum()
    with pytest.raises(TypeError, match=r"objective 'a' must be a dense tensor.*sparse=False"):
        gradients.backward({"a": loss, "b": loss})
    assert table.weight.grad is None


def test_wrong_losses():
    model = network()
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    good = losses_of(model, batch())
    with pytest.raises(ValueError, match=r"missing \['b'\], unknown \['d'\]; correct the keys"):
        gradients.backward({"a": good["a"], "c": good["c"], "d": good["b"]})
    with pytest.raises(ValueError, match=r"one loss for each of \('a', 'b', 'c'\), got 2"):
        gradients.backward([good["a"], good["b"]])
    with pytest.raises(TypeError, match=r"got Tensor; write \{'a': loss, \.\.\.\}"):
        gradients.backward(good["a"])
    with pytest.raises(TypeError, match=r"`losses`\['b'\] must be a tensor, got float"):
        gradients.backward({**good, "b": 0.0})
    with pytest.raises(ValueError, match=r"`losses`\['c'\] must be a scalar, got shape \[8, 3\]"):
        gradients.backward({**good, "c": model(batch())})
    with pytest.raises(ValueError, match=r"nothing that requires grad.*`0\.0 \* scores\.sum\(\)`"):
        gradients.backward({**good, "c": torch.tensor(0.0)})
    assert all(p.grad is None for p in model.parameters())


def constants_by_no_grad(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return losses_of(model, x)


def detached(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {name: loss.detach() for name, loss in losses_of(model, x).items()}


def zeros(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return dict.fromkeys(WEIGHTS, torch.zeros(()))


@pytest.mark.parametrize("arrange", [dict, lambda d: list(d.values())])
@pytest.mark.parametrize("made", [constants_by_no_grad, detached, zeros])
@pytest.mark.parametrize("mode", [None, "one_backward", "autograd", "gram_first"])
def test_constants_for_every_objective_are_refused(mode, made, arrange):
    model, x = network(), batch()
    opt = ClippedCAGradAdamW(model.parameters(), weights=WEIGHTS)
    losses, scores = arrange(made(model, x)), model(x).sum(1)
    message = r"at least one that requires grad, got constants for all of .*torch\.no_grad\(\)"
    with pytest.raises(ValueError, match=message):
        opt.backward(losses, scores=scores, mode=mode)
    assert all(p.grad is None for p in model.parameters())
    some = dict(zip(WEIGHTS, [0.0 * scores.sum(), *zeros(model, x).values()], strict=False))
    opt.backward(some, scores=scores, mode="autograd")  # nothing for some of them is allowed


def test_wrong_objective_names_and_nesting():
    gradients = ObjectiveGradients(network().parameters(), WEIGHTS)
    with (
        pytest.raises(ValueError, match=r"one of the objectives \('a', 'b', 'c'\), got 'd'"),
        gradients.objective("d"),
    ):
        pass
    with (
        gradients.objective("a"),
        pytest.raises(RuntimeError, match=r"objective\('b'\) was entered inside objective\('a'\)"),
        gradients.objective("b"),
    ):
        pass


def test_wrong_construction():
    model = network()
    with pytest.raises(ValueError, match="`weights` must sum to 1"):
        ObjectiveGradients(model.parameters(), {"a": 0.5, "b": 0.4})
    with pytest.raises(ValueError, match="`params` must hold at least one parameter"):
        ObjectiveGradients([], WEIGHTS)
    for wrong in (model, model[0].weight):
        with pytest.raises(
            TypeError, match=r"`params` must be an iterable .* model.parameters\(\)"
        ):
            ObjectiveGradients(wrong, WEIGHTS)
