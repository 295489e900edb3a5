"""The two passes of "gram_first" on several processes; see `gram_first.py`.

pass one   every layer's m gradients are summed over processes in parts, only products are kept
pass two   p.grad = G0: FSDP2 reduces its shards as in any backward pass; of replicas each
           process has its own part of G0, which is averaged
"""

import torch
from torch import Tensor

from raco_fast.distributed.dtensor import is_dtensor
from raco_fast.distributed.processes import Processes
from raco_fast.distributed.replicas import averages
from raco_fast.engine.backward import collect, propagate
from raco_fast.engine.exactness import Exactness, Pass
from raco_fast.engine.gradient_collector import GradientCollector
from raco_fast.engine.graph import ScoreGraph
from raco_fast.engine.sample_products import SampleProducts
from raco_fast.engine.scattered_check import ScatteredCheck
from raco_fast.gradients.scattered_gram import ScatteredGram


def gram_of(
    served: Pass,
    m: int,
    exactness: Exactness,
    processes: Processes,
    samples: SampleProducts | None = None,
) -> Tensor | None:
    """M of the averages over processes by pass one, float64 [m, m]; None where it would be wrong.

    The graph is kept. `samples` also gets what every sample has with itself.
    """
    graph, check = served.graph, served.check
    assert check is None or isinstance(check, ScatteredCheck), "parts are compared with parts"
    into = ScatteredGram(graph, m, processes, None if check is None else check.look)

    def run() -> str | None:
        collector = GradientCollector(served.factored, into, graph.wanted, samples)
        collect(collector.collect, graph, served.factored.seeds, retain_graph=True)
        collector.finish()
        into.finish()
        return (
            None if check is None else check.mismatch([p for p in graph.uses if not is_dtensor(p)])
        )

    if check is None:
        run()
    elif not exactness.checked(graph, check, run):
        return None
    graph.retained = True
    return into.gram()


def average_in_p_grad(graph: ScoreGraph, seeds: Tensor, processes: Processes) -> None:
    """p.grad = the average over processes of the gradients of Σ_b seeds_b score_b, by pass two."""
    used = [p for p in graph.wanted if p in graph.leaves]
    replicas = [p for p in graph.wanted if not is_dtensor(p)]
    if len(replicas) < len(graph.wanted):
        propagate(graph.scores, seeds, inputs=[graph.leaves[p] for p in used])
        own = [p.grad for p in replicas]
    else:
        # No hook of a wrapper's may see it, which would average it as well.
        found = torch.autograd.grad(
            [graph.scores], used, [seeds.to(graph.scores)], allow_unused=True
        )
        of_used = dict(zip(used, found, strict=True))
        own = [of_used.get(p) for p in replicas]
    for p, g in zip(replicas, averages(replicas, own, processes), strict=True):
        p.grad = g
