import math

import pytest
import torch

from raco_fast import solve_dual
from raco_fast.dpo.losses.margin_losses import Sigmoid
from raco_fast.dpo.losses.pair_scores import PairScores
from raco_fast.dpo.losses.reference_free_losses import Orpo
from raco_fast.dpo.metrics import PreferenceMetrics, solution_metrics


def scores_of(rows) -> PairScores:
    return PairScores(
        *(torch.tensor(column, dtype=torch.float32) for column in zip(*rows, strict=True))
    )


#      pi a   pi b   ref a  ref b  tokens
ROWS = [
    (-10.0, -20.0, -12.0, -19.0, 3, 4),
    (-30.0, -25.0, -30.0, -27.0, 5, 6),
    (-8.0, -9.0, -8.0, -9.0, 2, 2),
    (math.nan, -1.0, -1.0, -1.0, 2, 2),  # labelled for nothing
]
LOSSES = {"x": Sigmoid(beta=0.5), "y": Sigmoid(beta=0.5)}
LABELS = {"x": torch.tensor([1, -1, 1, 0]), "y": torch.tensor([-1, 0, 0, 0])}


def test_preference_metrics_against_numbers_worked_out_by_hand():
    metrics = PreferenceMetrics(LOSSES)
    scores = scores_of(ROWS)
    for chosen in ([0, 3], [1, 2]):  # in two batches
        rows = torch.tensor(chosen)
        metrics.add(scores[rows], {name: label[rows] for name, label in LABELS.items()})
    result = metrics.result()
    # x: rewards a - b: pair 0 (1, -0.5), pair 1 (chosen b: 1, a: 0), pair 2 (0, 0): half right
    expected = {
        "rewards/chosen/x": (1 + 1 + 0) / 3,
        "rewards/rejected/x": (-0.5 + 0 + 0) / 3,
        "rewards/margins/x": (1.5 + 1 + 0) / 3,
        "rewards/accuracies/x": 2.5 / 3,
        "logps/chosen/x": (-10 - 25 - 8) / 3,
        "logps/rejected/x": (-20 - 30 - 9) / 3,
        "logps/accuracies/x": 1.0,
        "pairs/x": 3,
        "rewards/chosen/y": -0.5,
        "rewards/rejected/y": 1.0,
        "rewards/margins/y": -1.5,
        "rewards/accuracies/y": 0.0,
        "logps/chosen/y": -20.0,
        "logps/rejected/y": -10.0,
        "logps/accuracies/y": 0.0,
        "pairs/y": 1,
        "rewards/chosen": (2 - 0.5) / 4,
        "rewards/rejected": (-0.5 + 1) / 4,
        "rewards/margins": (2.5 - 1.5) / 4,
        "rewards/accuracies": 2.5 / 4,
        "logps/chosen": (-43 - 20) / 4,
        "logps/rejected": (-59 - 10) / 4,
        "logps/accuracies": 3 / 4,
    }
    assert result == pytest.approx(expected)


def test_a_soft_label_counts_for_its_likelier_response_and_one_half_for_none():
    results = []
    for label in ([0.8, -0.6, 0.5, 0], [1, -1, 0, 0]):
        metrics = PreferenceMetrics(LOSSES)
        metrics.add(scores_of(ROWS), {"x": torch.tensor(label)})
        results.append(metrics.result())
    assert results[0] == results[1]


def test_nothing_labelled_gives_no_metrics():
    metrics = PreferenceMetrics(LOSSES)
    metrics.add(scores_of(ROWS), {"x": torch.zeros(4)})
    assert metrics.result() == {}


def test_rewards_have_the_scale_of_each_objectives_loss():
    metrics = PreferenceMetrics({"x": Sigmoid(beta=0.25), "y": Orpo()})
    scores, label = scores_of(ROWS), torch.tensor([1, -1, 0, 0])
    metrics.add(scores, {"x": label, "y": label})
    result = metrics.result()
    assert result["rewards/chosen/x"] == pytest.approx(0.25 * (2 + 2) / 2)
    assert result["rewards/rejected/y"] == pytest.approx((-1 + 0) / 2)
    assert result["rewards/margins"] == pytest.approx((0.25 * 5 + 5) / 4)


def test_solution_metrics_have_the_names_of_the_design():
    gram = torch.tensor([[17.0, -5.0, 1.0], [-5.0, 2.0, 0.5], [1.0, 0.5, 4.0]])
    solution = solve_dual(gram, {"a": 0.2, "b": 0.5, "c": 0.3}, 0.5)
    metrics = solution_metrics(solution, ("a", "b", "c"))
    per_objective = ("weight", "p", "coefficient", "grad_norm")
    assert set(metrics) == {
        *(f"raco/{name}" for name in ("gap", "clip_active", "g0_norm", "update_norm", "c")),
        *(f"raco/{name}/{objective}" for name in per_objective for objective in "abc"),
        "raco/cosine/a:b",
        "raco/cosine/a:c",
        "raco/cosine/b:c",
    }
    assert metrics["raco/cosine/a:b"] == pytest.approx(-5 / math.sqrt(34))
    assert metrics["raco/cosine/b:c"] == pytest.approx(0.5 / math.sqrt(8))
    assert metrics["raco/grad_norm/c"] == pytest.approx(2.0)
    assert sum(metrics[f"raco/p/{name}"] for name in "abc") == pytest.approx(1.0)
    assert (metrics["raco/c"], metrics["raco/weight/b"]) == (0.5, 0.5)
    assert all(type(value) is float for value in metrics.values())
