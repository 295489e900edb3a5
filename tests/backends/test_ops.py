"""Every operation: argument checks, and which backend runs."""

import ast
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import raco_fast
from raco_fast.backends import choose, cpu, cuda, ops, reference
from raco_fast.backends.plan import Plan
from raco_fast.backends.rounding import Place, Rounding
from raco_fast.backends.types import AdamWOptions, Call, Gradients, Update
from raco_fast.solver.dual import solve_dual


def two_lists() -> list[list[torch.Tensor | None]]:
    return [[torch.ones(3), torch.ones(2, 2)], [torch.ones(3) * 2, None]]


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, str]]:
    """(backend, operation) of every operation that runs; nothing is computed."""
    made: list[tuple[str, str]] = []
    for module in (cpu, reference):

        def record(operation, name=module.name):
            return lambda *a: made.append((name, operation)) or torch.eye(2)

        for operation in ("gram", "combine", "combine_adamw"):
            monkeypatch.setattr(module, operation, record(operation))
    return made


OPTIONS = AdamWOptions(lr=0.01, beta1=0.8, beta2=0.95, eps=1e-7, weight_decay=0.05)


def run_all(
    grads: list[list[torch.Tensor | None]] | None = None,
    tensors: list[torch.Tensor] | None = None,
    **options,
) -> None:
    grads = two_lists() if grads is None else grads
    like = [torch.empty(3), torch.empty(2, 2)] if tensors is None else tensors
    alpha = torch.ones(2, dtype=torch.float64)
    ops.gram(grads)
    ops.combine(grads, alpha, like)
    steps = [torch.zeros(()) for _ in like]
    update = Update(like, grads, like, like, [], steps, replace(OPTIONS, **options))
    ops.combine_adamw(update, alpha)


def ran(*backends: str) -> list[tuple[str, str]]:
    return list(zip(backends, ("gram", "combine", "combine_adamw"), strict=True))


def test_cpu_tensors_take_the_cpu_backend(calls):
    run_all()
    assert calls == ran("cpu", "cpu", "cpu")


def test_the_forced_backend_is_the_one_that_runs(calls):
    with choose.backend("reference"):
        run_all()
        with choose.backend("cpu"):
            run_all()
        ops.gram(two_lists())
    ops.gram(two_lists())
    once = [("reference", "gram"), ("cpu", "gram")]
    assert calls == [*ran(*["reference"] * 3), *ran(*["cpu"] * 3), *once]


def test_an_exception_ends_the_forcing(calls):
    with pytest.raises(KeyError), choose.backend("reference"):
        raise KeyError
    run_all()
    assert calls == ran("cpu", "cpu", "cpu")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"amsgrad": True}, "amsgrad=True"),
        ({"capturable": True}, "capturable=True"),
        ({"differentiable": True}, "differentiable=True"),
        ({"foreach": False}, "foreach is set"),
        ({"fused": True}, "fused is set"),
        ({"lr": torch.tensor(0.1, requires_grad=True)}, "lr is a tensor that requires grad"),
        ({"beta2": torch.tensor(0.9, device="meta")}, "beta2 is a tensor .* not on the CPU"),
    ],
    ids=str,
)
def test_options_of_the_reference(calls, options, reason):
    run_all(**options)
    assert calls == ran("cpu", "cpu", "reference")
    like = [[torch.ones(2)]]
    call = Call("combine_adamw", 1, like, like, replace(OPTIONS, **options))
    assert choose.name_of(call) == "reference"
    assert choose.name_of(replace(call, options=OPTIONS)) == "cpu"
    forced = pytest.raises(
        RuntimeError,
        match=rf"'cpu' cannot run this combine_adamw: {reason}.*backend\('reference'\)",
    )
    with forced, choose.backend("cpu"):
        run_all(**options)


def test_options_of_the_cpu_backend(calls):
    run_all(maximize=True, lr=torch.tensor(0.1), beta1=torch.tensor(0.9))
    assert calls == ran("cpu", "cpu", "cpu")


def like_two(make) -> list[torch.Tensor]:
    return [make(torch.ones(3, 4)), torch.ones(2)]


LAYOUTS = {
    "expanded": (lambda x: x[:, :1].expand(3, 4), "expanded, sparse, or a view with gaps"),
    "gaps": (lambda x: torch.ones(3, 8)[:, ::2], "expanded, sparse, or a view with gaps"),
    "complex": (lambda x: x.to(torch.complex64), "a tensor is torch.complex64 .float32, bfl"),
    "negation": (lambda x: torch._neg_view(x), "a pending negation"),
    "subclass": (lambda x: x.as_subclass(type("Mine", (torch.Tensor,), {})), "a tensor is a Mine"),
    "meta": (lambda x: x.to("meta"), "a tensor is on meta"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_tensors_of_the_reference(calls, name):
    make, reason = LAYOUTS[name]
    grads, tensors = [like_two(make), like_two(make)], like_two(make)
    run_all(grads, tensors)
    assert calls == ran("reference", "reference", "reference")
    with (
        pytest.raises(RuntimeError, match=f"cannot run this gram: .*{reason}"),
        choose.backend("cpu"),
    ):
        ops.gram(grads)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda x: x.t().contiguous().t(), "differ in memory layout"),
        (lambda x: x.double(), "are torch.float64 and torch.float32"),
        (lambda x: x.flatten(), r"have the shapes \[12\] and \[3, 4\]"),
    ],
)
def test_tensors_that_do_not_match_go_to_the_reference(calls, make, reason):
    grads = [like_two(torch.clone), like_two(torch.clone)]
    run_all(grads, like_two(make))
    assert calls == ran("cpu", "reference", "reference")
    with pytest.raises(RuntimeError, match=reason), choose.backend("cpu"):
        run_all(grads, like_two(make))


def test_tensors_of_the_cpu_backend(calls):
    for make in (
        lambda x: x.t().contiguous().t(),  # dense in another order
        lambda x: torch.ones(13, dtype=torch.bfloat16)[1:].view(3, 4),  # misaligned
        lambda x: torch.ones(2, 3, 4)[1],
        lambda x: torch.ones(3, 1, 4).transpose(0, 1),
        lambda x: x.double(),
    ):
        run_all([like_two(make), like_two(make)], like_two(make))
    assert set(calls) == set(ran("cpu", "cpu", "cpu"))


def test_what_autograd_would_record_goes_to_the_reference(calls):
    tensors = [t.requires_grad_() for t in (torch.ones(3), torch.ones(2, 2))]
    run_all(tensors=tensors)
    assert calls == ran("cpu", "reference", "reference")
    with torch.no_grad():
        run_all(tensors=tensors)
    assert calls[3:] == ran("cpu", "cpu", "cpu")


@pytest.mark.parametrize(
    ("installed", "device", "cure"),
    [
        (False, True, r"package triton is missing; pip install 'raco-fast\[triton\]'"),
        (True, False, "no CUDA device; install a CUDA build of torch .* use backend"),
    ],
)
def test_forcing_triton_where_it_cannot_run_raises(installed, device, cure, monkeypatch):
    monkeypatch.setattr(cuda, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
    monkeypatch.setattr(cuda, "missing", cuda.missing.__wrapped__)
    refused = pytest.raises(RuntimeError, match="backend 'triton' cannot run here: .*" + cure)
    with refused, choose.backend("triton"):
        pass


def test_forced_triton_refuses_what_it_cannot_do(monkeypatch):
    monkeypatch.setattr(cuda, "missing", lambda: None)
    refused = pytest.raises(
        RuntimeError,
        match=r"backend 'triton' cannot run this gram: .* take CUDA tensors",
    )
    with refused, choose.backend("triton"):
        ops.gram([[torch.ones(2)], [torch.ones(2)]])


@pytest.fixture
def on_cuda(monkeypatch) -> Call:
    """A call of tensors that say they are on a CUDA device where the kernels could run."""
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(cuda, "missing", lambda: None)
    monkeypatch.setattr(cuda, "_impossible", lambda call: None)
    monkeypatch.setattr(choose, "_disagreements", {})
    monkeypatch.setattr(cpu, "obstacle", lambda call, forced: "a tensor is on cuda")
    tensor = SimpleNamespace(device=torch.device("cuda"))
    return Call("gram", 1, (), [[tensor]])


def test_cuda_tensors_take_triton_once_it_has_proved_itself(on_cuda, monkeypatch):
    from raco_fast.backends import self_test

    asked = []
    monkeypatch.setattr(self_test, "disagreement", lambda *call: asked.append(call))
    assert choose.name_of(on_cuda) == "triton"
    assert asked == []  # whoever only asks compiles nothing
    for _ in range(2):
        assert choose.chosen(on_cuda) is cuda
    assert asked == [(cuda, "step", torch.device("cuda"))]
    with choose.backend("reference"):
        assert choose.chosen(on_cuda) is reference


def test_a_kernel_that_disagrees_is_named_once_and_not_used(on_cuda, monkeypatch):
    from raco_fast.backends import self_test

    monkeypatch.setattr(self_test, "disagreement", lambda *call: "`combine` differs")
    with pytest.warns(UserWarning, match="kernels are not used on cuda: `combine` differs; plain"):
        assert choose.chosen(on_cuda) is reference
    assert choose.chosen(replace(on_cuda, operation="combine")) is reference  # without a warning
    assert choose.name_of(on_cuda) == "reference"
    with choose.backend("triton"):
        assert choose.chosen(on_cuda) is cuda


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"x": torch.ones(5, 2, 3)},
            r"\[5 rows, features\], .* got \[5, 2, 3\] and \[5, 4\]",
        ),
        ({"dy": torch.ones(6, 4)}, r"as `bounds` say, got \[5, 3\] and \[6, 4\]; flatten"),
        ({"bounds": [0, 2, 4]}, r"must be \[4 rows"),
        ({"bounds": [1, 2, 5]}, r"must be \[5 rows"),
        ({"U": torch.ones(2, 3)}, "`U` must have 2 columns, one per group, .* got 3 columns"),
        ({"U": torch.ones(3, 2)}, r"`out` must be \[3 objectives, 4, 3\], got .* \[2, 4, 3\]"),
        ({"U": None}, r"`out` must be \[1 objectives, 4, 3\]"),
        ({"out": torch.ones(2, 3, 4)}, r"`out` must be \[2 objectives, 4, 3\], .* \[2, 3, 4\]"),
    ],
)
def test_rows_of_a_layer_that_do_not_fit_together(wrong, message):
    right = {"x": torch.ones(5, 3), "dy": torch.ones(5, 4), "bounds": [0, 2, 5]}
    right |= {"U": torch.ones(2, 2), "out": torch.ones(2, 4, 3)}
    ops.weight_grad(**right, fresh=True)
    with pytest.raises(ValueError, match=message):
        ops.weight_grad(**{**right, **wrong}, fresh=True)


def test_unknown_backend_raises():
    unknown = pytest.raises(ValueError, match=r"`name` must be one of \('triton', .* got 'cuda'")
    with unknown, choose.backend("cuda"):
        pass


def test_a_gradient_whose_squares_underflow_counts_as_zero():
    tiny, ordinary = torch.full((5,), 1e-24), torch.ones(5)
    assert reference.gram([[tiny], [ordinary]])[0, 1] > 0  # no Gram matrix: M_00 is 0
    M = ops.gram([[tiny], [ordinary]])
    assert M.tolist() == [[0.0, 0.0], [0.0, 5.0]]
    solution = solve_dual(M, [0.3, 0.7], 0.4)
    assert solution.finite
    assert solution.g0_norm == pytest.approx(0.7 * 5**0.5)


def test_collinear_gradients_give_a_gram_matrix_in_spite_of_rounding():
    base = torch.randn(100_003, generator=torch.Generator().manual_seed(0))
    for factor in (-0.1, 0.7, 3.3):
        M = ops.gram([[base], [base * factor], [base]])
        norms = M.diagonal().sqrt()
        assert (M.abs() <= torch.outer(norms, norms) * (1 + 1e-15)).all()
        assert M[0, 2] == M[0, 0]


def test_a_non_finite_gram_stays_so():
    M = ops.gram([[torch.tensor([torch.nan])], [torch.ones(1)]])
    assert M.isnan().tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ([], "`grads` must hold at least one list"),
        ([[torch.ones(2)], []], "got 1 tensors in list 0 and 0 in list 1; put None"),
        (
            [[None, torch.ones(2)], [None, torch.ones(3)]],
            r"`grads`\[1\]\[1\] must have the shape of `grads`\[0\]\[1\], got \[3\] and \[2\]",
        ),
        (
            [[None], [torch.ones(2)], [torch.ones(2, dtype=torch.bfloat16)]],
            r"`grads`\[2\]\[0\] must have the dtype of `grads`\[1\]\[0\], got torch.bfloat16",
        ),
        (
            [[torch.ones(2)], [torch.ones(2, device="meta")]],
            r"`grads`\[1\]\[0\] must have the device of `grads`\[0\]\[0\], got meta and cpu",
        ),
    ],
)
def test_gradients_that_do_not_fit_together(grads, message):
    with pytest.raises(ValueError, match=message):
        ops.gram(grads)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_sparse_and_quantized_gradients_are_refused():
    with pytest.raises(
        TypeError, match=r"`grads`\[0\]\[0\] must be a dense tensor, got sparse_coo"
    ):
        ops.gram([[torch.ones(2, 2).to_sparse()]])
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match="must be a dense tensor, got quantized"):
        ops.gram([[quantized]])


def test_coefficients_and_outputs_must_fit():
    alpha = torch.ones(3, dtype=torch.float64)
    out = [torch.empty(3), torch.empty(2, 2)]
    with pytest.raises(ValueError, match=r"`coefficients` must have shape \[2\], .* got \[3\]"):
        ops.combine(two_lists(), alpha, out)
    with pytest.raises(ValueError, match="`out` must have one tensor per gradient, got 1 for 2"):
        ops.combine(two_lists(), alpha[:2], out[:1])
    update = Update(out, two_lists(), out, out, [], out)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "steps"):
        with pytest.raises(ValueError, match=f"`{name}` must have one tensor .* got 1 for 2"):
            ops.combine_adamw(replace(update, **{name: out[:1]}), alpha[:2])
    split = replace(update, rounding=Rounding("split", out[:1]))
    with pytest.raises(ValueError, match=r"`rounding.residuals` must have one tensor .* 1 for 2"):
        ops.combine_adamw(split, alpha[:2])
    rounded = replace(update, rounding=Rounding("stochastic"))
    with pytest.raises(ValueError, match=r"'stochastic' is for bfloat16 .* got torch.float32; use"):
        ops.combine_adamw(rounded, alpha[:2])
    placed = replace(update, rounding=Rounding(places=[Place(0)]))
    with pytest.raises(ValueError, match=r"`rounding.places` must be empty or .* got 1 for 2"):
        ops.combine_adamw(placed, alpha[:2])
    with pytest.raises(RuntimeError, match=r"coefficients on meta need .* got 'cpu'; pass coeff"):
        ops.combine_adamw(update, alpha[:2].to("meta"))


def test_a_call_of_a_backend_that_waits_is_never_said_not_to(monkeypatch):
    call, plan = Call("gram", 1, (), [[torch.ones(2)]]), Plan()
    choose.planned(call, plan)
    monkeypatch.setattr(cuda, "obstacle", lambda *asked: None)
    monkeypatch.setattr(choose, "_disagreement", lambda *asked: None)
    assert choose.waits(call, plan) == "backend 'cpu' was chosen for tensors like these"
    assert choose.waits(call, Plan()) is None
    with choose.backend("cpu"):
        assert choose.waits(call, plan) == "backend 'cpu' is forced"


class InFloat64:
    """A backend of one operation: what a new one has to have."""

    name = "float64"
    on_device = unproved = False

    def missing(self) -> None:
        return None

    def obstacle(self, call: Call, forced: bool) -> str | None:
        if call.operation != "combine":
            return "it has `combine` alone"
        if any(t.dtype != torch.float64 for t in call.tensors()):
            return "it takes float64 tensors"
        return None

    def combine(self, grads: Gradients, coefficients: Tensor, out: Sequence[Tensor]) -> None:
        for column, target in zip(zip(*grads, strict=True), out, strict=True):
            target.copy_(sum(a * g for a, g in zip(coefficients, column, strict=True)))


def test_a_new_backend_is_one_object_in_one_list(monkeypatch):
    monkeypatch.setattr(choose, "BACKENDS", [InFloat64(), *choose.BACKENDS])
    alpha = torch.tensor([0.5, -2.0], dtype=torch.float64)
    grads = [[torch.full((3,), x, dtype=torch.float64)] for x in (4.0, 1.5)]
    calls, out = [], [torch.empty(3, dtype=torch.float64)]
    monkeypatch.setattr(cpu, "combine", lambda *call: calls.append(call))
    ops.combine(grads, alpha, out)
    assert out[0].tolist() == [-1.0] * 3
    assert ops.gram(grads)[0, 0] == 48.0  # by another backend
    assert calls == []
    ops.combine([[g.float() for g in one] for one in grads], alpha, [out[0].float()])
    assert len(calls) == 1
    with raco_fast.backend("float64"):
        ops.combine(grads, alpha, out)
        with pytest.raises(RuntimeError, match="'float64' cannot run this gram: it has `combine`"):
            ops.gram(grads)


def test_only_the_registry_knows_backends_by_name():
    names = {"triton", "reference"}  # "cpu" is a device as well
    package = Path(raco_fast.__file__).parent
    above = {*(package / "dpo").rglob("*.py")}  # where a reference is a model
    for file in {*package.rglob("*.py")} - above:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                sides += [e for s in sides if isinstance(s, (ast.Tuple, ast.Set)) for e in s.elts]
                compared = {s.value for s in sides if isinstance(s, ast.Constant)}
                assert not compared & names, f"{file}:{node.lineno}"
