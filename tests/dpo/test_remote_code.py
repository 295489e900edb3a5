"""Code that comes with a model is run where that is asked for, and nowhere else."""

import json

import pytest

from raco_fast.dpo.models import ModelOptions
from raco_fast.dpo.policy import load_base_model, load_config, load_tokenizer

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own(save_tiny, tmp_path, monkeypatch):
    """The folder of a model whose classes are in it."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = save_tiny()
    (folder / "own.py").write_text(CODE)
    file = folder / "config.json"
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    changes = {"model_type": "own_llama", "auto_map": classes, "architectures": ["OwnForCausalLM"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return str(folder)


def test_it_is_run_where_it_is_trusted(own):
    options = ModelOptions(own, device="cpu", trust_remote_code=True)
    assert type(load_config(options)).__name__ == "OwnConfig"
    assert type(load_base_model(options)).__name__ == "OwnForCausalLM"
    assert len(load_tokenizer(options)) > 0


def test_an_error_names_the_setting(own):
    options = ModelOptions(own, device="cpu")
    for load in (load_config, load_base_model):
        with pytest.raises(
            ValueError, match=r"`model.name`: .* set `model.trust_remote_code: true` if"
        ):
            load(options)


def test_a_folder_has_no_versions(tiny):
    options = ModelOptions(str(tiny), device="cpu", revision="main")
    with pytest.raises(
        ValueError, match=r"`model.revision` is for a name of the hub, got 'main' for"
    ):
        load_base_model(options)
