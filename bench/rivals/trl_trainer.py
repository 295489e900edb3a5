"""TRL's `DPOTrainer` on the same model, ids and adapter: plain DPO, one objective.

At its best: reference precomputed, fused AdamW, no gradient checkpointing (its default, which
saves memory and costs time), no clipping, logging, evaluation, saving or schedule. It is given
`peft_config` and not a PEFT model, as it advises: of such a model it would keep a second adapter.
Its remaining advice for speed does not apply: padding-free batches are switched off in this
version, nothing here is padded, and kernels from the Hub need a network.

What it does in every step and cannot be told not to (norm of the gradient, about ten metrics, each
read back to the host) is a part of its time; fetching and collating the batch is not.
"""

from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

from bench.harness.dpo_problem import BETA, PROMPT, FreshProblem, lora
from bench.harness.meter import Meter
from bench.rivals.dpo_steps import ADAMW


def train(problem: FreshProblem, steps: int, meter: Meter) -> None:
    """Train `problem.model` for so many steps, each one metered."""
    adapted = problem.setting.kind == "lora"
    adapter = {name: p.detach() for name, p in problem.trained.items()} if adapted else {}
    with TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model=problem.model.unload() if adapted else problem.model,
            args=_config(folder, problem, steps),
            train_dataset=_dataset(problem, steps),
            processing_class=_tokenizer(problem.stop),
            peft_config=lora() if adapted else None,
            callbacks=[_Metered(meter)],
        )
        problem.model = trainer.model
        with torch.no_grad():  # its own adapter has other random numbers
            for name, start in adapter.items():
                problem.trained[name].copy_(start)
        trainer.train()


def _config(folder: str, problem: FreshProblem, steps: int) -> DPOConfig:
    device = problem.ids.device
    return DPOConfig(
        folder,
        beta=BETA,
        precompute_ref_log_probs=True,
        per_device_train_batch_size=problem.setting.sequences // 2,
        max_steps=steps,
        train_sampling_strategy="sequential",
        max_length=None,
        learning_rate=ADAMW["lr"],
        lr_scheduler_type="constant",
        weight_decay=ADAMW["weight_decay"],
        max_grad_norm=0.0,
        optim="adamw_torch_fused",
        bf16=False,  # no autocast: the weights have the dtype that everyone computes in
        gradient_checkpointing=False,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=device.type == "cuda",
        use_cpu=device.type == "cpu",
    )


def _dataset(problem: FreshProblem, steps: int) -> Dataset:
    """The pairs as text, once for each step."""
    words = _words(problem.stop)
    text = [" ".join(words[i] for i in row) for row in problem.ids.tolist()]
    cut = [len(" ".join(words[i] for i in row[:PROMPT])) for row in problem.ids.tolist()]
    pairs = problem.setting.sequences // 2
    rows = [
        {"prompt": a[:cut], "chosen": a[cut:], "rejected": b[cut:]}
        for a, b, cut in zip(text[:pairs], text[pairs:], cut[:pairs], strict=True)
    ]
    return Dataset.from_list(rows * steps)


def _words(stop: int) -> list[str]:
    """The vocabulary: a word for each id, the last one the stop token."""
    return [*(f"t{i}" for i in range(stop)), "</s>"]


def _tokenizer(stop: int) -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(_words(stop))}
    tokenizer = Tokenizer(WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", unk_token="t0"
    )


class _Metered(TrainerCallback):
    """From the batch being on the host to the weights being new."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.meter.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.meter.end()
