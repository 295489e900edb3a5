"""TRL's `DPOTrainer` on the same model, ids and adapter: plain DPO, one objective.

At its best: reference precomputed, fused AdamW, no gradient checkpointing (its default, which
saves memory and costs time), no clipping, logging, evaluation, saving or schedule. Its collator
pads a micro-batch to its longest sequence, chosen and rejected in one tensor; so that little is
padding, the pairs of a step come in the order of their lengths, which `group_by_length` has over
a whole data set, and several sizes of a micro-batch are tried. It is given `peft_config` and not a
PEFT model, as it advises: of such a model it would keep a second adapter. Its remaining advice for
speed does not apply: padding-free batches are switched off in this version (it warns and pads),
and kernels from the Hub need a network.

What it does in every step and cannot be told not to (norm of the gradient, about ten metrics, each
read back to the host) is a part of its time; fetching and collating the batches is not. On a CPU
its head takes every position, prompts and padding too (on a GPU the completions alone), which at
30 layers of SmolLM2 is a fifth of a forward pass.
"""

from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

from bench.harness.dpo_problem import BETA, lora
from bench.harness.meter import Meter
from bench.harness.pairs_problem import PairsProblem
from bench.rivals.dpo_steps import ADAMW


def train(
    problem: PairsProblem, order: Sequence[int], at_once: int, steps: int, meter: Meter
) -> None:
    """Train `problem.model` for so many steps, each one metered.

    Args:
        order: in which the pairs of a step come.
        at_once: pairs of a micro-batch; must divide those of a step.
    """
    adapted = problem.setting.kind == "lora"
    adapter = {name: p.detach() for name, p in problem.trained.items()} if adapted else {}
    with TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model=problem.model.unload() if adapted else problem.model,
            args=_config(folder, problem, at_once, steps),
            train_dataset=_dataset(problem, order),
            processing_class=_tokenizer(problem.stop),
            peft_config=lora() if adapted else None,
            callbacks=[_Metered(meter)],
        )
        problem.model = trainer.model
        with torch.no_grad():  # its own adapter has other random numbers
            for name, start in adapter.items():
                problem.trained[name].copy_(start)
        trainer.train()


def _config(folder: str, problem: PairsProblem, at_once: int, steps: int) -> DPOConfig:
    device = torch.device(problem.setting.device)
    if len(problem.pairs) % at_once:
        raise ValueError(
            f"`at_once` must divide the {len(problem.pairs)} pairs of a step, got {at_once}: its "
            f"trainer weighs micro-batches alike"
        )
    return DPOConfig(
        folder,
        beta=BETA,
        precompute_ref_log_probs=True,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=len(problem.pairs) // at_once,
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


def _dataset(problem: PairsProblem, order: Sequence[int]) -> Dataset:
    """The pairs of a step, which is an epoch, as text; words are set apart by spaces."""
    words = _words(problem.stop)

    def text(ids: Sequence[int]) -> str:
        return " ".join(words[i] for i in ids)

    pairs = [problem.pairs[k] for k in order]
    return Dataset.from_list(
        [
            {
                "prompt": text(pair.prompt_ids),
                "chosen": " " + text(pair.a_ids),
                "rejected": " " + text(pair.b_ids),
            }
            for pair in pairs
        ]
    )


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
