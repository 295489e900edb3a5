"""What a figure was measured on: the machine, the library versions, the commit.

Imports nothing of raco_fast, so that a run whose build failed can still say where it failed.
"""

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shutil import which
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("torch", "triton", "transformers", "peft", "trl", "numpy", "setuptools")


@cache
def card(device: str) -> dict[str, Any]:
    """The machine card; one per process, since it is written into every record."""
    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(properties.L2_cache_size / 2**20, 1),
            "cuda": torch.version.cuda,
            "driver, clocks, limit": _nvidia_smi(),
        }
    return found


@cache
def versions() -> dict[str, str]:
    """Python and the libraries that a figure depends on; without those that are missing."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@cache
def commit() -> str:
    """The commit measured, with "-dirty" where files differ from it.

    A copy of the files without their history takes it from the environment variable COMMIT.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return os.environ.get("COMMIT") or _said(command) or "unknown"


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    found = re.search(r"^model name\s*: (.*)", text, flags=re.MULTILINE)
    return found[1].strip() if found else platform.processor()


def _nvidia_smi() -> str | None:
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    said = _said(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"])
    return said and said.splitlines()[0]


def _said(command: Sequence[str]) -> str | None:
    """What a command prints; None where it is missing, fails or hangs."""
    if which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
