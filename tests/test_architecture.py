"""The layout holds: imports point one way, public names are few, the README's tree is the tree."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import raco_fast

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "raco_fast"

# From the ground up; a module may import from lower layers only. Inside `dpo` and `demo` the order
# of the list is the order of the road that data takes.
LAYERS = [
    ["_C", "kernels", "rounding", "host_memory", "report", "weight_grad", "clipping", "overflow"],
    ["layout", "reference", "objective_grad", "objectives"],
    ["triton_numbers", "triton_weight_grad"],
    ["cpu", "triton_backend", "checks"],
    ["proof"],
    ["dispatch", "dual", "segments"],
    ["ops"],
    ["uses"],
    ["layers"],
    ["tap"],
    ["prepared", "head", "graph"],
    ["one_backward"],
    ["spot_check", "objective_losses"],
    ["exactness"],
    ["accumulation"],
    ["gradients", "device_step"],
    ["param_groups", "direction", "settings"],
    ["combined"],
    ["gram_first"],
    ["verification"],
    ["optimizer"],
    ["dpo.files", "dpo.rows", "dpo.logps", "dpo.losses", "dpo.interrupt"],
    ["dpo.pairs", "dpo.formats", "dpo.models"],
    ["dpo.data"],
    ["dpo.rendering"],
    ["dpo.tokenization"],
    ["dpo.batches", "dpo.config"],
    ["dpo.dataset", "dpo.scoring", "dpo.metrics", "dpo.checkpoint", "dpo.model_card"],
    ["dpo.evaluation", "dpo.verification"],
    ["dpo.trainer"],
    ["demo.config", "demo.documents", "demo.results"],
    ["demo.judges"],
    ["demo.model", "demo.summary"],
    ["demo.claims", "demo.plot"],
    ["demo.report", "demo.jobs"],
    ["demo.study"],
    ["cli"],
]
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}


def modules() -> dict[str, Path]:
    """Dotted name below the package -> file, of every module with code in it."""
    files = [f for f in PACKAGE.rglob("*.py") if f.name != "__init__.py"]
    return {".".join(f.relative_to(PACKAGE).with_suffix("").parts): f for f in files}


def imports(file: Path) -> set[tuple[str, bool]]:
    """(imported dotted name, whether only for type checking) of a file, also inside functions."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name, id(node) in typing_only) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module in ("raco_fast", "raco_fast.dpo", "raco_fast.demo"):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {(name, id(node) in typing_only) for name in names}
    return found


def test_every_module_has_its_layer() -> None:
    assert set(modules()) == set(HEIGHT) - {"_C", "kernels"}


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_down(name: str) -> None:
    for imported, typing_only in imports(modules()[name]):
        if imported.startswith("raco_fast.") and not typing_only:
            below = imported.removeprefix("raco_fast.")
            below = "kernels" if below.startswith("kernels.") else below
            assert HEIGHT[below] < HEIGHT[name], f"{name} imports {below}, which lies no lower"


@pytest.mark.parametrize("name", sorted(modules()))
def test_language_models_stay_above_the_optimizer(name: str) -> None:
    if not name.startswith(("dpo.", "demo.")):
        outside = {imported.split(".")[0] for imported, _ in imports(modules()[name])}
        assert not outside & {"transformers", "peft", "tokenizers", "safetensors"}


def test_kernels_import_nothing_of_the_package() -> None:
    for file in (ROOT / "kernels").glob("*.py"):
        assert not [i for i, _ in imports(file) if i.startswith("raco_fast")], file
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_csrc_knows_neither_torch_nor_parameters() -> None:
    sources = list((ROOT / "csrc").iterdir())
    assert sources
    for file in sources:
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", file.read_text()), file


def test_public_names() -> None:
    assert raco_fast.__all__ == [
        "ClippedCAGradAdamW",
        "DualSolution",
        "ObjectiveGradients",
        "__version__",
        "backend",
        "combine",
        "gram_first",
        "prepare",
        "register_rule",
        "sequences",
        "solve_dual",
        "verify",
    ]
    assert all(hasattr(raco_fast, name) for name in raco_fast.__all__)


def test_importing_is_light() -> None:
    code = (
        "import sys, raco_fast; "
        "print([m for m in ('transformers', 'peft', 'triton', 'jsonargparse') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "[]"


def test_no_broad_except() -> None:
    for file in modules().values():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, file
                assert ast.unparse(node.type) not in ("Exception", "BaseException"), file
