"""What is installed is what was written: kernels, type marker, extension, wheel from sdist."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(code: str, cwd: Path) -> str:
    """Standard output of a fresh interpreter that runs `code` in `cwd`."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_kernels_are_a_part_of_the_package(tmp_path: Path) -> None:
    code = "import raco_fast.kernels as k; print(list(k.__path__)[0])"
    for folder in (ROOT, tmp_path):
        assert Path(run(code, folder)).resolve() == (ROOT / "kernels").resolve()


def test_the_checkout_does_not_shadow_the_package_named_kernels() -> None:
    # transformers probes for a package `kernels`; a checkout root on sys.path must not answer.
    code = "import transformers; print(transformers.LlamaForCausalLM.__name__)"
    assert run(code, ROOT) == "LlamaForCausalLM"
    assert run("import importlib.util as u; s = u.find_spec('kernels'); "
               "print(s is None or s.origin is None)", ROOT) == "True"  # fmt: skip


def test_the_extension_is_compiled() -> None:
    from raco_fast import _C

    assert _C.__file__ is not None
    assert Path(_C.__file__).suffix in (".so", ".pyd")


@pytest.mark.slow
def test_sdist_to_wheel_to_use(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", tmp_path, ROOT], check=True, capture_output=True
    )
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    with tarfile.open(sdist) as archive:
        shipped = {"/".join(name.split("/")[1:]) for name in archive.getnames()}
    assert {
        "csrc/solver/dual.cpp",
        "csrc/solver/dual.hpp",
        "LICENSE",
        "README.md",
        "setup.py",
    } <= shipped
    with zipfile.ZipFile(wheel) as archive:
        installed = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    wanted = {"py.typed", "_C.pyi", "optim/combine.py", "kernels/README.md", "dpo/run/trainer.py"}
    assert {f"raco_fast/{name}" for name in wanted} <= installed
    assert not any(name.startswith(("tests/", "bench/", "csrc/")) for name in installed)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import raco_fast; "
        "print(raco_fast.solve_dual([[2.0, -1.0], [-1.0, 2.0]], [0.5, 0.5], 0.4).p, "
        "raco_fast.__file__)"
    )
    printed = run(code, tmp_path)
    assert printed.startswith("[0.5 0.5]")
    assert str(tmp_path) in printed
