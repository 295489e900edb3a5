"""A damaged model, adapter or tokenizer loads, or is one message that names its folder."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from gguf_files import write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from raco_fast.dpo.causality import check_causal
from raco_fast.dpo.models import ModelOptions
from raco_fast.dpo.policy import load_base_model, load_tokenizer, make_policy

KINDS = (".json", ".safetensors", ".gguf")
# What a value of a JSON file may have become; no numbers that ask for gigabytes of layers.
OTHER = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 40),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
    st.sampled_from(["", "x", "LlamaForCausalLM", "llama", "../..", "\ud800", "{{"]),
    st.just([]),
    st.just({}),
    st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.sampled_from(["type", "x"]), st.none(), max_size=2),
)


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """A saved model and a saved adapter on it, each with its tokenizer."""
    adapter = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config).save_pretrained(adapter)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(adapter)
    gguf = tmp_path_factory.mktemp("gguf")
    write_gguf(AutoModelForCausalLM.from_pretrained(tiny), gguf / "tiny.gguf")
    return {"model": tiny, "adapter": adapter, "gguf": gguf}


def load(folder, tokenizer):
    (file,) = list(folder.glob("*.gguf")) or [None]
    options = ModelOptions(str(file or folder), tokenizer if file else None, device="cpu")
    load_tokenizer(options)
    policy = make_policy(load_base_model(options), options)
    check_causal(policy.model, torch.arange(3, 9))


def places(value, at=()):
    """The paths of all values in what JSON holds."""
    yield at
    if isinstance(value, dict | list):
        children = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in list(children)[:30]:
            yield from places(child, (*at, key))


def damage(draw, file):
    """Truncate a file, flip some of its bytes, or change a value of its JSON."""
    content = file.read_bytes()
    ways = ["cut", "flip", "json", "json"] if file.suffix == ".json" else ["cut", "flip"]
    how = draw(st.sampled_from(ways))
    if how == "cut":
        file.write_bytes(content[: draw(st.integers(0, len(content) - 1))])
    elif how == "flip":
        changed = bytearray(content)
        front = min(len(content), 3000)  # most of a weights file is numbers: any bytes will do
        # A number of layers in a GGUF file may become one that takes years to set up.
        layers = content.find(b"block_count")
        for _ in range(draw(st.integers(1, 4))):
            place = draw(st.integers(0, front - 1))
            if not 0 <= place - layers < 20:
                changed[place] ^= draw(st.integers(1, 255))
        file.write_bytes(changed)
    else:
        values = json.loads(content)
        *parents, last = draw(st.sampled_from(list(places(values))[1:]))
        inner = values
        for key in parents:
            inner = inner[key]
        inner[last] = draw(OTHER)
        file.write_text(json.dumps(values), encoding="utf-8")


def check(folders, kind, data):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "damaged")
        shutil.copytree(folders[kind], folder)
        files = sorted(f for f in folder.iterdir() if f.suffix in KINDS)
        damage(data.draw, data.draw(st.sampled_from(files)))
        said = "damaged"
        try:
            load(folder, str(folders["model"]))
        except (ValueError, OSError) as error:
            said = str(error)
        assert "damaged" in said or "LlamaForCausalLM" in said
        assert len(said) < 1200


@pytest.mark.parametrize("kind", ["model", "adapter"])
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_folder_loads_or_is_named(folders, kind, data):
    check(folders, kind, data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "adapter", "gguf"])
@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_folder_loads_or_is_named_at_length(folders, kind, data):
    check(folders, kind, data)
