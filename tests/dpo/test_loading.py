"""What is not a whole causal LM is refused by name, before it trains as something else."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from raco_fast.dpo.causality import check_causal
from raco_fast.dpo.models import LoraOptions, ModelOptions
from raco_fast.dpo.policy import load_base_model, load_tokenizer

QUANTIZED = {
    "bitsandbytes, 4 bits": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "bitsandbytes, 8 bits": {"load_in_8bit": True},
    "gptq, 4 bits": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq, 4 bits": {"quant_method": "awq", "bits": 4, "version": "gemm"},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "mxfp4": {"quant_method": "mxfp4"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "config_groups": {}},
    "torchao": {"quant_method": "torchao", "quant_type": "int4_weight_only"},
}


def load(folder, lora=None, **options):
    return load_base_model(ModelOptions(str(folder), device="cpu", lora=lora, **options))


def change_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def copy(tiny, tmp_path):
    """A function that copies a saved model, without its tensors whose names have `but` in them."""

    def make(source=tiny, but=None):
        folder = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(source, folder)
        if but is not None:
            file = folder / "model.safetensors"
            kept = {n: t for n, t in load_file(file).items() if but not in n}
            save_file(kept, file, metadata={"format": "pt"})
        return folder

    return make


def test_missing_weights_are_named_with_their_number(copy):
    with pytest.raises(
        ValueError,
        match=r"'.*copy-0' lacks 1 weights of a LlamaForCausalLM, which would be random: "
        r"lm_head.weight \(its config.json says \['LlamaForCausalLM'\]\); use a complete",
    ):
        load(copy(but="lm_head"))
    with pytest.raises(ValueError, match=r"lacks 9 weights .*layers.1.input_la.* and 6 more \("):
        load(copy(but="layers.1."))


def test_tied_weights_are_not_missing(save_tiny):
    folder = save_tiny(tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load(folder)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_weights_of_another_shape_are_named(copy):
    folder = copy()
    change_config(folder, intermediate_size=48)
    with pytest.raises(
        ValueError, match=r"another shape .*gate_proj.weight is \[40, 24\] for \[48"
    ):
        load(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_a_classifier_is_refused_though_only_its_head_is_another(tmp_path, tied):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\(LlamaForSequenceClassification, .*not trained to wri"):
        load(tmp_path)
    change_config(tmp_path, architectures=None)
    if tied:  # nothing is missing, and nothing else says what it is
        load(tmp_path)
    else:
        with pytest.raises(ValueError, match=r"lacks 1 weights .*lm_head.weight"):
            load(tmp_path)


def test_weights_that_are_left_out_are_told_once(copy, caplog):
    folder = copy()
    file = folder / "model.safetensors"
    more = {f"score.{k}": torch.ones(2) for k in range(5)}
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    load(folder)
    (said,) = [r.getMessage() for r in caplog.records if r.name.startswith("raco_fast")]
    assert "`model.name`: 5 weights of " in said
    assert "are no part of a LlamaForCausalLM and were left out: score.0, score.1" in said


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("T5", "T5ForConditionalGeneration, model_type 't5'.* an encoder with a decoder"),
        ("Bart", "BartForConditionalGeneration.* an encoder with a decoder"),
        ("Clip", "CLIPModel, model_type 'clip'.* not among the causal LMs"),
        ("Bert", "BertForMaskedLM, model_type 'bert'.* not trained to write text"),
    ],
)
def test_another_kind_of_model_is_refused_before_its_weights_are_read(tmp_path, kind, reason):
    import transformers

    config, model = {
        "T5": ("T5Config", "T5ForConditionalGeneration"),
        "Bart": ("BartConfig", "BartForConditionalGeneration"),
        "Clip": ("CLIPConfig", "CLIPModel"),
        "Bert": ("BertConfig", "BertForMaskedLM"),
    }[kind]
    settings = getattr(transformers, config)()
    settings.architectures = [model]
    settings.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"`model.name` must be a causal language .*\({reason}"):
        load(tmp_path)


def test_an_encoder_with_the_head_of_a_decoder_is_found_by_what_it_computes(make_model):
    from transformers import BertConfig, BertLMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 30}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    for dtype, scale in ((torch.float32, 0.02), (torch.bfloat16, 0.3)):
        ids, sizes["initializer_range"] = torch.arange(3, 19), scale
        encoder = BertLMHeadModel(BertConfig(**sizes)).to(dtype)
        with pytest.raises(ValueError, match=r"\(BertLMHeadModel\) predicts tokens from those aft"):
            check_causal(encoder, ids)
        assert encoder.training
        check_causal(BertLMHeadModel(BertConfig(is_decoder=True, **sizes)).to(dtype), ids)
        check_causal(make_model().to(dtype), ids)
        check_causal(make_model().to(dtype), torch.tensor([4, 4]))


@pytest.mark.parametrize("method", QUANTIZED)
def test_full_tuning_of_quantized_weights_is_refused_before_they_are_read(copy, method):
    folder = copy()
    change_config(folder, quantization_config=QUANTIZED[method])
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        ValueError,
        match=rf"'.*copy-0' are quantized \({method}\), which full fine-tuning cannot change; "
        r"train an adapter on them \(`model.lora: .*or use the model that they were made from",
    ):
        load(folder)


@pytest.mark.parametrize(
    ("method", "package"),
    [("bitsandbytes, 4 bits", "bitsandbytes"), ("gptq, 4 bits", "gptqmodel|optimum")],
)
def test_a_package_that_an_adapter_on_quantized_weights_needs_is_named(copy, method, package):
    if any(__import__("importlib").util.find_spec(name) for name in package.split("|")):
        pytest.skip(f"{package} is installed")
    folder = copy()
    change_config(folder, quantization_config=QUANTIZED[method])
    with pytest.raises(
        ValueError, match=rf"cannot be loaded: .*({package}).*; install it"
    ) as error:
        load(folder, lora=LoraOptions(r=2))
    assert len(str(error.value)) < 700


def test_a_method_without_gradients_takes_no_adapter(copy):
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config("frozen")
    class FrozenConfig(QuantizationConfigMixin):
        def __init__(self, **_):
            self.quant_method = "frozen"

    @register_quantizer("frozen")
    class Frozen(HfQuantizer):
        requires_calibration = False
        is_trainable = False

        def is_serializable(self):
            return True

    folder = copy()
    change_config(folder, quantization_config={"quant_method": "frozen"})
    with pytest.raises(
        ValueError, match=r"quantization \(frozen\) has no gradients; use the model"
    ):
        load(folder, lora=LoraOptions(r=2))


def test_a_tokenizer_without_files_is_named(copy):
    folder = copy()
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"'.*copy-0' cannot be loaded: .*`model.tokenizer`"):
        load_tokenizer(ModelOptions(str(folder), device="cpu"))
    (folder / "tokenizer.json").write_text('{"version": 3}')
    with pytest.raises(ValueError, match=r"'.*copy-0' cannot be loaded: .*`model.tokenizer`"):
        load_tokenizer(ModelOptions(str(folder), device="cpu"))


def test_the_attention_is_the_one_asked_for(tiny):
    assert load(tiny, attention="eager").config._attn_implementation == "eager"
    assert load(tiny).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("attention", ["no such", "flash_attention_2"])
def test_an_attention_that_is_not_there_is_named(tiny, attention):
    with pytest.raises(ValueError, match=rf"`model.attention` must be .*, got '{attention}'"):
        load(tiny, attention=attention)
