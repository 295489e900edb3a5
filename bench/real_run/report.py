"""The real run's part of docs/results.md, from its committed metrics."""

import json
from statistics import mean
from typing import Any

from bench.real_run.run import DATA_SETS, RESULTS, RULES
from raco_fast.report import markdown_table, share_with_interval, wilson_interval

Record = dict[str, Any]


def read(data_set: str, rule: str) -> tuple[list[Record], list[Record]]:
    """(training records, evaluations) of one run, in order."""
    lines = (RESULTS / f"{data_set}-{rule}.jsonl").read_text(encoding="utf-8").splitlines()
    training, evaluations = [], []
    for record in map(json.loads, lines):
        evaluated = any(name.startswith("eval_") for name in record)
        (evaluations if evaluated else training).append(record)
    return training, evaluations


def objectives(records: list[Record]) -> list[str]:
    """Names of the objectives, from the losses of the first step."""
    return [name.removeprefix("loss/") for name in records[0] if name.startswith("loss/")]


def accuracy_table(data_set: str) -> str:
    """Held-out accuracies per objective, before and after, of every rule."""
    rows = []
    for rule in RULES:
        training, evaluations = read(data_set, rule)
        before, after = evaluations[0], evaluations[-1]
        for name in objectives(training):
            pairs = int(after[f"eval_pairs/{name}"])
            shares = [r[f"eval_logps/accuracies/{name}"] for r in (before, after)]
            shares.append(after[f"eval_rewards/accuracies/{name}"])
            cells = [share_with_interval(share, pairs) for share in shares]
            margin = after[f"eval_rewards/margins/{name}"]
            losses = f"{before[f'eval_loss/{name}']:.4f} → {after[f'eval_loss/{name}']:.4f}"
            rows.append([name, f"`{rule}`", str(pairs), *cells, f"{margin:+.3f}", losses])
    titles = ["objective", "rule", "pairs", "likelihood before", "likelihood after"]
    titles += ["reward after", "reward margin after", "loss before → after"]
    return markdown_table(titles, rows)


def combination_table(data_set: str) -> str:
    """How the rules combined the gradients."""
    rows = []
    for rule in RULES:
        training, _ = read(data_set, rule)
        means = {k: mean(r[k] for r in training) for k in training[0] if k.startswith("raco/")}
        cosines, coefficients = (
            "; ".join(f"{k.removeprefix(of)} {v:{form}}" for k, v in means.items() if of in k)
            for of, form in (("raco/cosine/", "+.2f"), ("raco/coefficient/", ".2f"))
        )
        clipped = f"{means['raco/clip_active']:.0%}"
        rows.append([f"`{rule}`", str(len(training)), cosines, coefficients, clipped])
    titles = ["rule", "steps", "mean cosine", "mean coefficient", "clip active"]
    return markdown_table(titles, rows)


def verdict(data_set: str) -> str:
    """One sentence per objective: whether the rules' reward accuracies differ, from each other
    and from a coin.
    """
    final = {f"`{rule}`": read(data_set, rule)[1][-1] for rule in RULES}
    sentences = []
    for name in objectives(read(data_set, RULES[0])[0]):
        intervals = {
            rule: wilson_interval(r[f"eval_rewards/accuracies/{name}"], r[f"eval_pairs/{name}"])
            for rule, r in final.items()
        }
        (a, (low_a, high_a)), (b, (low_b, high_b)) = intervals.items()
        relation = "lie apart" if low_a > high_b or low_b > high_a else "overlap"
        above = " and ".join(rule for rule, (low, _) in intervals.items() if low > 0.5)
        below = " and ".join(rule for rule, (_, high) in intervals.items() if high < 0.5)
        sentences.append(
            f"- {name}: the intervals of {a} and {b} {relation}; with 50 % outside the interval, "
            f"above chance: {above or 'neither'}, below chance: {below or 'neither'}."
        )
    return "\n".join(sentences)


def part() -> list[str]:
    """Paragraphs and tables."""
    parts = [
        "## A real model on real preferences",
        "From `bench/results/real_run/`; the protocol is "
        "`bench/real_run/*.yaml`, the command `make real-run`. SmolLM2-135M-Instruct (4-bit "
        "weights unpacked to fp32) with a LoRA adapter of rank 16 on every linear layer, one pass "
        "over a part of each training file, the same seed, data order and step size for both "
        "rules. No setting was tuned on the held-out pairs. Each rule ran once: the intervals "
        "(95 %, Wilson) cover the choice of held-out pairs, not the randomness of training.",
        "*Likelihood* ranks two responses by their log-probability, which the untrained model can "
        "do too. *Reward* ranks them by the implicit reward, beta times the change of the "
        "log-probability; before training it is zero for every response, that is 50 %.",
    ]
    for data_set in DATA_SETS:
        tables = (table(data_set) for table in (accuracy_table, combination_table, verdict))
        parts += [f"### {data_set}", *tables]
    machine = (RESULTS / "machine.txt").read_text(encoding="utf-8").strip()
    parts += [
        "These runs are short: they show that the whole road works on real input, not which rule "
        "is better.",
        f"Machine: {machine}.",
    ]
    return parts
