"""Rows in the schemas of public data sets, and what they say, read by plain code.

A reading is a list of (prompt turns, response a, response b, labels), labels in the order of the
objectives. It is the truth that loaders are held to, so nothing of the library may be in it.
"""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Rows = list[dict[str, Any]]
Reading = list[tuple[list[dict[str, Any]], str, str, tuple[float, ...]]]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def sign(x: float) -> int:
    return (x > 0) - (x < 0)


@dataclass
class PublicSet:
    """Rows of a schema, and what they say.

    Args:
        form: name of the format.
        run: objectives of the run.
        rows: generator of random numbers -> rows.
        reading: rows -> what they say.
        source: settings of the source.
    """

    form: str
    run: tuple[str, ...]
    rows: Callable[[random.Random], Rows]
    reading: Callable[[Rows], Reading]
    source: dict[str, Any] = field(default_factory=dict)


ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")


def ultrafeedback_rows(rng: random.Random) -> Rows:
    def completion(k: int) -> dict[str, Any]:
        ratings = {a: {"Rating": rng.choice(["1", "2", "3", "5", "N/A"])} for a in ASPECTS}
        return {"model": "m", "response": f"answer {k}", "annotations": ratings}

    return [
        {"source": "s", "instruction": f"do {n}", "completions": [completion(k) for k in range(4)]}
        for n in range(3)
    ]


def ultrafeedback_reading(rows: Rows) -> Reading:
    found: Reading = []
    for row in rows:
        for a, b in itertools.combinations(row["completions"], 2):
            labels = []
            for aspect in ASPECTS:
                one, two = (c["annotations"][aspect]["Rating"] for c in (a, b))
                labels.append(0 if "N/A" in (one, two) else sign(int(one) - int(two)))
            if any(labels):
                texts = (a["response"], b["response"])
                found.append(([user(row["instruction"])], *texts, tuple(labels)))
    return found


def helpsteer3_rows(rng: random.Random) -> Rows:
    return [
        {
            "domain": "general",
            "language": "english",
            "context": [user("a"), said("b"), user(f"c {n}")],
            "response1": "one",
            "response2": "two",
            "overall_preference": rng.randint(-3, 3),
            "individual_preference": [{"score": 1, "reasoning": "so"}],
        }
        for n in range(8)
    ]


def helpsteer3_reading(rows: Rows) -> Reading:
    """Negative: response1 is better."""
    return [
        (r["context"], r["response1"], r["response2"], (sign(-r["overall_preference"]),))
        for r in rows
    ]


def helpsteer2_preference_rows(rng: random.Random) -> Rows:
    return [
        {
            "split": "train",
            "prompt": f"first {n}\n<extra_id_1>Assistant\nsecond\n<extra_id_1>User\nthird",
            "response_1": "one",
            "response_2": "two",
            "preference_strength": rng.randint(-3, 3),
        }
        for n in range(8)
    ]


def helpsteer2_preference_reading(rows: Rows) -> Reading:
    """Positive: response_2 is better."""
    found: Reading = []
    for n, row in enumerate(rows):
        label = -1 if row["preference_strength"] > 0 else int(row["preference_strength"] < 0)
        found.append(([user(f"first {n}"), said("second"), user("third")], "one", "two", (label,)))
    return found


def shp_rows(rng: random.Random) -> Rows:
    rows = []
    for n in range(6):
        a, b = rng.sample(range(1, 50), 2)
        rows.append(
            {"post_id": str(n), "domain": "askx", "history": f"post {n}", "human_ref_A": "a"}
            | {"human_ref_B": "b", "labels": int(a > b), "score_A": a, "score_B": b}
            | {"score_ratio": max(a, b) / min(a, b), "seconds_difference": 1.0}
        )
    return rows


def shp_reading(rows: Rows) -> Reading:
    return [([user(r["history"])], "a", "b", (1 if r["labels"] == 1 else -1,)) for r in rows]


def comparisons_rows(rng: random.Random) -> Rows:
    post = {"id": "t3", "post": "It rained.", "title": "Rain", "subreddit": "weather"}
    article = {"id": "x", "post": None, "title": "News", "article": "It snowed.", "site": "cnn"}
    return [
        {
            "info": info,
            "summaries": [{"text": "one", "policy": "p"}, {"text": "two", "policy": "q"}],
        }
        | {"choice": rng.randint(0, 1), "worker": "w", "batch": "1", "extra": {"confidence": 3}}
        for info in (post, article, post)
    ]


def comparisons_reading(rows: Rows) -> Reading:
    post = "SUBREDDIT: r/weather\n\nTITLE: Rain\n\nPOST: It rained.\n\nTL;DR:"
    prompts = (post, "TITLE: News\n\nARTICLE: It snowed.\n\nTL;DR:", post)
    return [
        ([user(prompt)], "one", "two", ({0: 1, 1: -1}[row["choice"]],))
        for prompt, row in zip(prompts, rows, strict=True)
    ]


AXES = ("overall", "accuracy", "coverage", "coherence")


def axes_rows(rng: random.Random) -> Rows:
    rows = [
        {"info": {"id": f"t{post}", "post": f"text {post}", "title": "T"}}
        | {"worker": str(worker), "batch": "b", "split": "test"}
        | {
            "summary": {"text": f"s{post}{k}", "policy": "p"}
            | {"axes": {axis: rng.choice([None, 1, 2, 4, 7]) for axis in AXES}}
        }
        for post in range(2)
        for k in range(3)
        for worker in range(2)
    ]
    rng.shuffle(rows)
    return rows


def axes_reading(rows: Rows) -> Reading:
    ids = list(dict.fromkeys(row["info"]["id"] for row in rows))
    found: Reading = []
    for post in ids:
        mine = [row for row in rows if row["info"]["id"] == post]
        texts = list(dict.fromkeys(row["summary"]["text"] for row in mine))
        for a, b in itertools.combinations(texts, 2):
            labels = []
            for axis in AXES:
                lists = [
                    [
                        row["summary"]["axes"][axis]
                        for row in mine
                        if row["summary"]["text"] == t and row["summary"]["axes"][axis] is not None
                    ]
                    for t in (a, b)
                ]
                known = all(lists)
                # sum(a) / len(a) against sum(b) / len(b), in whole numbers
                labels.append(
                    sign(sum(lists[0]) * len(lists[1]) - sum(lists[1]) * len(lists[0]))
                    if known
                    else 0
                )
            if any(labels):
                prompt = f"TITLE: T\n\nPOST: text {post[1:]}\n\nTL;DR:"
                found.append(([user(prompt)], a, b, tuple(labels)))
    return found


def intel_orca_rows(rng: random.Random) -> Rows:
    return [
        {"system": rng.choice(["", "Be brief."]), "question": f"q {n}"}
        | {"chosen": "yes", "rejected": "no"}
        for n in range(4)
    ]


def orca_reading(rows: Rows) -> Reading:
    found: Reading = []
    for row in rows:
        asked = user(row["question"] if "question" in row else row["input"])
        before = [{"role": "system", "content": row["system"]}] if row["system"] else []
        found.append(([*before, asked], "yes", "no", (int(row.get("status") != "tie"),)))
    return found


def argilla_orca_rows(rng: random.Random) -> Rows:
    return [
        {"system": "", "input": f"q {n}", "chosen": "yes", "rejected": "no"}
        | {"generations": ["yes", "no"], "rating": [9.0, 8.0], "chosen_score": 9.0}
        | {"status": rng.choice(["tie", "swapped", "unchanged"])}
        for n in range(8)
    ]


def nectar_rows(rng: random.Random) -> Rows:
    return [
        {
            "prompt": f"\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why {n}?\n\nAssistant: ",
            "answers": [
                {"answer": f"answer {k}", "model": "m", "rank": float(rng.randint(1, 7))}
                for k in range(7)
            ],
            "turns": 2,
            "num_responses": 7,
            "source": ["s"],
            "good_natured": True,
        }
        for n in range(2)
    ]


def nectar_reading(rows: Rows) -> Reading:
    found: Reading = []
    for n, row in enumerate(rows):
        prompt = [user("hi"), said("hello"), user(f"why {n}?")]
        for a, b in itertools.combinations(row["answers"], 2):
            if a["rank"] != b["rank"]:
                label = 1 if a["rank"] < b["rank"] else -1
                found.append((prompt, a["answer"], b["answer"], (label,)))
    return found


def nemo_rows(rng: random.Random) -> Rows:
    return [
        {
            "context": [user("hi"), said("hello"), user(f"why {n}?")],
            "completions": [
                {"rank": rank, "completion": [said(f"answer {k}")]}
                for k, rank in enumerate(rng.sample(range(3), 3))
            ],
            "task_name": "t",
        }
        for n in range(3)
    ]


def nemo_reading(rows: Rows) -> Reading:
    found: Reading = []
    for row in rows:
        for a, b in itertools.combinations(row["completions"], 2):
            texts = (c["completion"][0]["content"] for c in (a, b))
            found.append((row["context"], *texts, (1 if a["rank"] < b["rank"] else -1,)))
    return found


def sharegpt_rows(rng: random.Random) -> Rows:
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "hello"},
        {"from": "human", "value": "why?"},
    ]
    return [
        {"conversations": turns[start:], "chosen": {"from": "gpt", "value": "yes"}}
        | {"rejected": {"from": "gpt", "value": "no"}}
        for start in (0, 1, 3)
    ]


def sharegpt_reading(rows: Rows) -> Reading:
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    return [
        (
            [{"role": roles[t["from"]], "content": t["value"]} for t in row["conversations"]],
            row["chosen"]["value"],
            row["rejected"]["value"],
            (1,),
        )
        for row in rows
    ]


def alpaca_rows(rng: random.Random) -> Rows:
    return [
        {"instruction": "Add.", "input": "1 and 2", "chosen": "3", "rejected": "4"},
        {"instruction": "Say hi.", "input": "", "chosen": "hi", "rejected": "no"}
        | {"system": "Be brief.", "history": [["who?", "me"]]},
    ]


def alpaca_reading(rows: Rows) -> Reading:
    system = {"role": "system", "content": "Be brief."}
    return [
        ([user("Add.\n1 and 2")], "3", "4", (1,)),
        ([system, user("who?"), said("me"), user("Say hi.")], "hi", "no", (1,)),
    ]


def preference_collection_rows(rng: random.Random) -> Rows:
    rows = []
    for n in range(6):
        a, b = rng.sample(range(1, 6), 2)
        rows.append(
            {"orig_criteria": f"c {n}", "orig_instruction": f"do {n}", "orig_response_A": "a"}
            | {"orig_response_B": "b", "orig_score_A": str(a), "orig_score_B": str(b)}
            | {"orig_preference": "A" if a > b else "B", "orig_reference_answer": "r"}
        )
    return rows


def preference_collection_reading(rows: Rows) -> Reading:
    return [
        ([user(r["orig_instruction"])], "a", "b", ({"A": 1, "B": -1}[r["orig_preference"]],))
        for r in rows
    ]


def pku_rows(rng: random.Random) -> Rows:
    rows = []
    for n in range(8):
        levels = [rng.randint(0, 3), rng.randint(0, 3)]
        safer = int(levels[1] < levels[0])
        rows.append(
            {"prompt": f"q {n}", "response_0": "zero", "response_1": "one"}
            | {f"is_response_{k}_safe": levels[k] == 0 for k in (0, 1)}
            | {f"response_{k}_severity_level": levels[k] for k in (0, 1)}
            | {"better_response_id": rng.randint(0, 1), "safer_response_id": safer}
        )
    return rows


def pku_reading(rows: Rows) -> Reading:
    found: Reading = []
    for row in rows:
        by_id = {0: 1, 1: -1}
        zero, one = (row[f"response_{k}_severity_level"] for k in (0, 1))
        severity = 1 if zero < one else -1 if zero > one else 0
        labels = (by_id[row["better_response_id"]], by_id[row["safer_response_id"]], severity)
        found.append(([user(row["prompt"])], "zero", "one", labels))
    return found


def argilla_rows(rng: random.Random) -> Rows:
    return [
        {"source": "s", "instruction": f"do {n}", "chosen_response": "yes"}
        | {"rejected_response": "no", "chosen_avg_rating": 5.0, "rejected_avg_rating": 2.0}
        for n in range(2)
    ]


def argilla_reading(rows: Rows) -> Reading:
    return [([user(row["instruction"])], "yes", "no", (1,)) for row in rows]


def h4_rows(rng: random.Random) -> Rows:
    return [
        {"prompt": f"q {n}", "prompt_id": str(n), "chosen": [user(f"q {n}"), said("yes")]}
        | {"rejected": [user(f"q {n}"), said("no")], "messages": [user(f"q {n}"), said("yes")]}
        | {"score_chosen": 8.0, "score_rejected": 5.0}
        for n in range(2)
    ]


def h4_reading(rows: Rows) -> Reading:
    return [([user(row["prompt"])], "yes", "no", (1,)) for row in rows]


def qa_feedback_rows(rng: random.Random) -> Rows:
    rows = []
    for n in range(3):
        quality = [rng.randint(0, 2) for _ in range(4)]
        pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
        better = {1: 1, -1: 2, 0: 0}
        rows.append(
            {"question": f"q {n}?", "passages": [["title", "text"]]}
            | {f"prediction {k + 1}": f"answer {k}" for k in range(4)}
            | {"preference": [better[sign(quality[a] - quality[b])] for a, b in pairs]}
        )
    return rows


def qa_feedback_reading(rows: Rows) -> Reading:
    found: Reading = []
    for row in rows:
        numbers = iter(row["preference"])
        for first in (1, 2, 3):
            for second in range(first + 1, 5):
                number = next(numbers)
                if number:
                    texts = (row[f"prediction {k}"] for k in (first, second))
                    found.append(([user(row["question"])], *texts, (1 if number == 1 else -1,)))
    return found


SETS = {
    "UltraFeedback": PublicSet("ultrafeedback", ASPECTS, ultrafeedback_rows, ultrafeedback_reading),
    "HelpSteer 3": PublicSet("helpsteer3", ("helpful",), helpsteer3_rows, helpsteer3_reading),
    "HelpSteer 2, preferences": PublicSet(
        "helpsteer2-preference",
        ("preference_strength",),
        helpsteer2_preference_rows,
        helpsteer2_preference_reading,
    ),
    "SHP": PublicSet("shp", ("helpful",), shp_rows, shp_reading),
    "summarize, comparisons": PublicSet(
        "summarize-comparisons", ("quality",), comparisons_rows, comparisons_reading
    ),
    "summarize, axes": PublicSet("summarize-axes", AXES, axes_rows, axes_reading),
    "Orca, Intel": PublicSet("orca", ("helpful",), intel_orca_rows, orca_reading),
    "Orca, Argilla": PublicSet("orca", ("helpful",), argilla_orca_rows, orca_reading),
    "Nectar": PublicSet("nectar", ("helpful",), nectar_rows, nectar_reading),
    "NeMo-RL": PublicSet("nemo-rl", ("helpful",), nemo_rows, nemo_reading),
    "ShareGPT": PublicSet("sharegpt", ("helpful",), sharegpt_rows, sharegpt_reading),
    "Alpaca": PublicSet("alpaca", ("helpful",), alpaca_rows, alpaca_reading),
    "Preference-Collection": PublicSet(
        "preference-collection",
        ("judged",),
        preference_collection_rows,
        preference_collection_reading,
    ),
    "PKU-SafeRLHF v2": PublicSet(
        "pku", ("helpful", "harmless", "severity_level"), pku_rows, pku_reading
    ),
    "UltraFeedback, Argilla's first": PublicSet(
        "argilla", ("helpful",), argilla_rows, argilla_reading
    ),
    "UltraFeedback, H4": PublicSet("chosen-rejected", ("helpful",), h4_rows, h4_reading),
    "QA feedback": PublicSet("qa-feedback", ("helpful",), qa_feedback_rows, qa_feedback_reading),
}
