"""The layout holds: rooms build on the rooms below, public names are few, every room is named."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import raco_fast

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "raco_fast"

# From the ground up. A module imports from its own room, without a circle, and from rooms below.
# A name is a folder, or a module of its own; of two that fit, the longer one holds.
ROOMS = [
    "_C",
    "kernels",
    "report",
    "pages",
    "settings",
    "solver",
    "backends",
    "distributed",
    "engine",
    "gradients",
    "optim",
    "verification",
    "dpo.data",
    "dpo",
    "dpo.run",
    "studies",
    "demo",
    "cli",
    "__main__",
]


def modules() -> dict[str, Path]:
    """Dotted name below the package -> file, of every module with code in it."""
    files = [f for f in PACKAGE.rglob("*.py") if f.name != "__init__.py"]
    return {".".join(f.relative_to(PACKAGE).with_suffix("").parts): f for f in files}


def room_of(name: str) -> str:
    """The room of a module."""
    parts = name.split(".")
    prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next(prefix for prefix in prefixes if prefix in ROOMS)


def imports(file: Path) -> set[str]:
    """Dotted names of the modules that a file imports, also inside functions, also for types."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            of_modules = {n for n in names if n.removeprefix("raco_fast.") in MODULES}
            found |= of_modules or {node.module}
    return found


MODULES = modules()


def imported_from_here(name: str) -> set[str]:
    """Modules of the package that a module imports."""
    return {
        imported.removeprefix("raco_fast.")
        for imported in imports(MODULES[name])
        if imported.startswith("raco_fast.")
    }


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down(name: str) -> None:
    height = ROOMS.index(room_of(name))
    for below in imported_from_here(name):
        assert ROOMS.index(room_of(below)) <= height, f"{name} imports {below}, from a room above"


def test_no_room_has_a_circle() -> None:
    TopologicalSorter({name: imported_from_here(name) for name in MODULES}).prepare()


@pytest.mark.parametrize("folder", sorted({file.parent for file in MODULES.values()}))
def test_every_room_says_in_a_sentence_what_it_is_for(folder: Path) -> None:
    if folder.resolve() == (ROOT / "kernels").resolve() or folder == PACKAGE:
        return  # the first has a README.md, the second is the public interface
    sentence, *rest = ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body
    if folder != PACKAGE / "dpo":  # whose public names are pinned below
        assert not rest
    assert isinstance(sentence, ast.Expr)
    assert isinstance(sentence.value, ast.Constant)
    assert isinstance(sentence.value.value, str)
    assert sentence.value.value.endswith(".")


@pytest.mark.parametrize("name", sorted(MODULES))
def test_language_models_stay_above_the_optimizer(name: str) -> None:
    if not name.startswith(("dpo.", "demo.")):
        outside = {imported.split(".")[0] for imported in imports(MODULES[name])}
        assert not outside & {"transformers", "peft", "tokenizers", "safetensors"}


def test_kernels_import_nothing_of_the_package() -> None:
    for name, file in MODULES.items():
        if name.startswith("kernels."):
            ours = [i for i in imports(file) if i.startswith("raco_fast")]
            assert not [i for i in ours if not i.startswith("raco_fast.kernels.")], file
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_csrc_knows_neither_torch_nor_parameters() -> None:
    sources = [*(ROOT / "csrc").glob("*/*pp")]
    assert sources
    for file in sources:
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", file.read_text()), file


def test_public_names_of_dpo() -> None:
    import raco_fast.dpo

    assert raco_fast.dpo.__all__ == ["PackedRows", "packed_logps", "pair_rows"]


def test_public_names() -> None:
    assert raco_fast.__all__ == [
        "ClippedCAGradAdamW",
        "DualSolution",
        "ObjectiveGradients",
        "Rule",
        "__version__",
        "backend",
        "combine",
        "gram_first",
        "prepare",
        "register_combination_rule",
        "register_layer_rule",
        "sequences",
        "solve_dual",
        "verify",
    ]
    assert all(hasattr(raco_fast, name) for name in raco_fast.__all__)


def test_type_checkers_know_where_public_names_are() -> None:
    (only_for_types,) = (
        node
        for node in ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.If)
    )
    places = {
        alias.name: (node.module or "").removeprefix("raco_fast.")
        for node in only_for_types.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert places == raco_fast._PLACES
    assert {*places} == {*raco_fast.__all__} - {"__version__"} | {"register_rule"}
    with pytest.raises(AttributeError, match="has no attribute 'combined'"):
        _ = raco_fast.combined


def modules_after(code: str, *names: str) -> list[str]:
    """Those of the modules that an interpreter has imported after running some code."""
    code = f"import sys; {code}; print([m for m in {names} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    found: list[str] = ast.literal_eval(out.stdout.splitlines()[-1])
    return found


def test_importing_is_light() -> None:
    assert not modules_after("import raco_fast", "torch", "numpy", "jsonargparse")
    of_a_name = "import raco_fast; raco_fast.ClippedCAGradAdamW"
    assert not modules_after(of_a_name, "transformers", "peft", "triton", "jsonargparse")
    of_help = "from raco_fast.cli.program import main\ntry: main(['--help'])\n"
    of_help += "except SystemExit: pass\nprint()"
    assert not modules_after(of_help, "torch", "transformers", "matplotlib")


def test_no_broad_except() -> None:
    for file in MODULES.values():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, file
                assert ast.unparse(node.type) not in ("Exception", "BaseException"), file
