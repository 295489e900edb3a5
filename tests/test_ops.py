"""The dispatch: argument checks, and which backend runs."""

from types import SimpleNamespace

import pytest
import torch

from raco_fast import ops, reference
from raco_fast.dual import solve_dual


def two_lists() -> list[list[torch.Tensor | None]]:
    return [[torch.ones(3), torch.ones(2, 2)], [torch.ones(3) * 2, None]]


def test_reference_runs_by_default_and_when_forced(monkeypatch):
    calls = []
    monkeypatch.setattr(reference, "gram", lambda grads: calls.append("gram") or torch.eye(2))
    ops.gram(two_lists())
    with ops.backend("reference"):
        ops.gram(two_lists())
    assert calls == ["gram", "gram"]


def test_the_forced_backend_is_the_one_that_runs(monkeypatch):
    calls = []
    fake = SimpleNamespace(
        gram=lambda *a: calls.append("gram") or torch.eye(2),
        combine=lambda *a: calls.append("combine"),
        combine_adamw=lambda *a, **k: calls.append("combine_adamw"),
    )
    monkeypatch.setitem(ops._BUILT, "cpu", fake)
    alpha = torch.ones(2, dtype=torch.float64)
    out = [torch.empty(3), torch.empty(2, 2)]
    with ops.backend("cpu"):
        assert ops.active_backend() == "cpu"
        ops.gram(two_lists())
        ops.combine(two_lists(), alpha, out)
        ops.combine_adamw(out, two_lists(), alpha, [], [], [], [])
        with ops.backend("reference"):
            assert ops.active_backend() == "reference"
            ops.gram(two_lists())
        assert ops.active_backend() == "cpu"
    assert calls == ["gram", "combine", "combine_adamw"]
    assert ops.active_backend() == "reference"


def test_an_exception_ends_the_forcing(monkeypatch):
    monkeypatch.setitem(ops._BUILT, "cpu", reference)
    with pytest.raises(KeyError), ops.backend("cpu"):
        raise KeyError
    assert ops.active_backend() == "reference"


def test_forcing_a_backend_that_is_not_built_raises():
    missing = [name for name in ops.BACKENDS if name not in ops._BUILT and name != "triton"]
    for name in missing:
        cure = rf"backend '{name}' is not built .* use backend\('reference'\)"
        with pytest.raises(RuntimeError, match=cure), ops.backend(name):
            pass
    assert "reference" not in missing


@pytest.mark.parametrize(
    ("installed", "device", "cure"),
    [
        (False, True, r"package triton is missing; pip install 'raco-fast\[triton\]'"),
        (True, False, "no CUDA device; install a CUDA build of torch .* use backend"),
    ],
)
def test_forcing_triton_where_it_cannot_run_raises(installed, device, cure, monkeypatch):
    monkeypatch.setattr(ops, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
    monkeypatch.setattr(ops, "_missing_for_triton", ops._missing_for_triton.__wrapped__)
    refused = pytest.raises(RuntimeError, match="backend 'triton' cannot run here: .*" + cure)
    with refused, ops.backend("triton"):
        pass


def test_forced_triton_refuses_what_it_cannot_do(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(ops, "_missing_for_triton", lambda: None)
    with ops.backend("triton"):
        with pytest.raises(RuntimeError, match=r"take CUDA tensors; move the model with \.to"):
            ops.gram(two_lists())
        with pytest.raises(RuntimeError, match=r"got torch.float64; or use backend\('reference'\)"):
            ops.gram([[torch.ones(2, dtype=torch.float64)]])


def test_cuda_tensors_go_to_triton_by_default_and_others_to_the_reference(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    from raco_fast import triton_backend

    def like_cuda(t):
        return SimpleNamespace(device=torch.device("cuda"), dtype=t.dtype)

    monkeypatch.setattr(ops, "_missing_for_triton", lambda: None)
    monkeypatch.setattr(
        triton_backend,
        "unsupported",
        lambda m, tensors, **options: "float64" if tensors[-1].dtype == torch.float64 else None,
    )
    on_cuda = like_cuda(torch.ones(1))
    assert ops.active_backend([on_cuda]) == "triton"
    assert ops._module([[None, on_cuda]]) is triton_backend
    assert ops._module([[like_cuda(torch.ones(1).double())]]) is reference
    assert ops._module([[torch.ones(1)]]) is reference
    assert ops.active_backend() == "reference"
    monkeypatch.setattr(ops, "_missing_for_triton", lambda: "a device")
    assert ops._module([[on_cuda]]) is reference


def test_unknown_backend_raises():
    unknown = pytest.raises(ValueError, match=r"`name` must be one of \('triton', .* got 'cuda'")
    with unknown, ops.backend("cuda"):
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
    with pytest.raises(ValueError, match="`params` must have one tensor per gradient, got 1 for 2"):
        ops.combine_adamw(out[:1], two_lists(), alpha[:2], [], [], [], [])
