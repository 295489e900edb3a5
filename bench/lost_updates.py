"""What a tiny Llama in bfloat16 learns with each rounding, as a share of what float32 learns.

    python -m bench.lost_updates > bench/results/cpu-DATE/lost_updates.txt

Margins of the rewards after training all weights at lr 5e-6: `short`, 80 steps on 40 pairs, on
which it is evaluated too; `long`, 640 steps on 160 pairs, evaluated on 120 others. Ten minutes on
one core.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raco_fast import __version__
from raco_fast.dpo.data.data_source import DataSource
from raco_fast.dpo.models import ModelOptions
from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.run.trainer import train

TOPICS = ["tea", "rain", "chess", "bread"]
ANSWERS = ["yes", "no", "sure", "calm", "mad", "fine"]
OBJECTIVES = {"sure": "yes", "kind": "calm"}  # objective -> the word that it prefers
ROUNDINGS = ["nearest", "stochastic", "split"]
LENGTHS = {"short": (40, 0, 16, 5), "long": (160, 120, 32, 3)}  # pairs, held out, epochs, seeds


def write_pairs(file: Path, n: int, seed: int) -> None:
    """`n` pairs in which each objective prefers one response."""
    draw, lines = random.Random(seed), []
    while len(lines) < n:
        texts = [draw.choices(ANSWERS, k=draw.randint(2, 6)) for _ in range(2)]
        ahead = {o: texts[0].count(w) - texts[1].count(w) for o, w in OBJECTIVES.items()}
        if all(ahead.values()):
            row = {
                "id": str(len(lines)),
                "prompt": [{"role": "user", "content": f"what of {draw.choice(TOPICS)}"}],
                "response_a": " ".join(texts[0]),
                "response_b": " ".join(texts[1]),
                "preferences": {o: 1 if x > 0 else -1 for o, x in ahead.items()},
            }
            lines.append(json.dumps(row) + "\n")
    file.write_text("".join(lines))


def save_model(folder: Path, seed: int) -> None:
    """A Llama of 64 features and two layers, with a token for each word."""
    words = ["<unk>", "<s>", "</s>", "Human", "Assistant", ":", "what", "of", *TOPICS, *ANSWERS]
    core = Tokenizer(models.WordLevel({w: k for k, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def margin(folder: Path, name: str, dtype: Any, rounding: str, epochs: int, seed: int) -> float:
    """The rewards' margin after a run."""
    held_out = folder / "held_out.jsonl"
    evaluated = held_out if held_out.exists() else folder / "train.jsonl"
    config = TrainConfig(
        model=ModelOptions(name=str(folder), dtype=dtype, device="cpu"),
        data=[DataSource(path=str(folder / "train.jsonl"))],
        eval_data=[DataSource(path=str(evaluated))],
        weights={"sure": 0.6, "kind": 0.4},
        lr=5e-6,
        epochs=epochs,
        pairs_per_step=8,
        pairs_per_micro_batch=8,
        rounding=rounding,
        seed=seed,
        output_dir=str(folder / name),
        cache_dir=str(folder / "cache"),
    )
    found = train(config)["eval_rewards/margins"]
    assert found is not None
    return found


def main() -> None:
    """Print a line for each run, then a table of shares."""
    torch.set_num_threads(1)
    print(f"raco_fast {__version__}, torch {torch.__version__}, CPU, one thread")
    for length in sys.argv[1:] or LENGTHS:
        pairs, held_out, epochs, seeds = LENGTHS[length]
        shares: dict[str, list[float]] = {name: [] for name in ROUNDINGS}
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                save_model(folder, seed)
                write_pairs(folder / "train.jsonl", pairs, seed)
                if held_out:
                    write_pairs(folder / "held_out.jsonl", held_out, 100 + seed)
                exact = margin(folder, "exact", "fp32", "nearest", epochs, seed)
                for name in ROUNDINGS:
                    shares[name].append(margin(folder, name, "bf16", name, epochs, seed) / exact)
            found = ", ".join(f"{name} {each[-1]:.1%}" for name, each in shares.items())
            print(f"{length}, seed {seed}: margin of float32 {exact:.6f}; {found}", flush=True)
        for name, each in shares.items():
            mean, least, most = statistics.mean(each), min(each), max(each)
            print(f"{length}, {name}: {mean:.1%} ({least:.1%} to {most:.1%})", flush=True)


if __name__ == "__main__":
    main()
