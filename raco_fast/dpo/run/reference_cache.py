"""Reference log-probabilities, computed once and cached.

The reference model is the policy before training, so no second model stays in memory. They are
cached on disk under a hash of everything they depend on: the weights, what is scored, and the token
ids of every pair, which follow from the data, the tokenizer, the chat template and the truncation.

Of several processes each scores its share, and the first reads and writes the cache.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from raco_fast.distributed.processes import Processes
from raco_fast.dpo.data.batches import micro_batches
from raco_fast.dpo.data.tokenization import EncodedPair, collate
from raco_fast.dpo.modes import evaluating
from raco_fast.dpo.run.checksums import DamagedError, load_checked, save_checked
from raco_fast.dpo.run.files import atomic_file
from raco_fast.dpo.run.reference_parts import ReferenceParts
from raco_fast.dpo.run.together import by_first
from raco_fast.dpo.scoring import ReferenceLogps, adapter_off, pair_logps
from raco_fast.dpo.sharded import free_gathered

logger = logging.getLogger(__name__)

AsReference = Callable[[nn.Module], AbstractContextManager[None]]


def data_hash(pairs: Sequence[EncodedPair], *, with_labels: bool = True) -> str:
    """Hash of the token ids and labels of every pair, in order.

    Without the ids, which a renamed file changes where its rows have none.
    """
    digest = hashlib.sha256()
    for pair in pairs:
        content: tuple[object, ...] = (pair.prompt_ids, pair.a_ids, pair.b_ids)
        if with_labels:
            content += (sorted(pair.labels.items()),)
            content += (sorted(pair.pair_weights.items()),) if pair.pair_weights else ()
        digest.update(repr(content).encode())
    return digest.hexdigest()


def reference_logps(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    *,
    model_hash: str,
    pad_id: int,
    cache_dir: Path,
    batch_pairs: int,
    chunk_tokens: int,
    tail: float = 1.0,
    as_reference: AsReference = adapter_off,
) -> ReferenceLogps:
    """Reference log-probabilities of `pairs`, from the cache or computed and cached.

    Args:
        model: the model before training.
        pairs: encoded pairs with unique ids, of which `batch_pairs` are scored at once.
        model_hash: `raco_fast.dpo.models.fingerprint` of what the reference computes.
        cache_dir: created where missing. Where it cannot be written, the log says so and nothing
            is cached.
        pad_id, chunk_tokens: as in `collate` and `sequence_logps`.
        tail: weight of the tokens past the shorter response's end, as in `pair_logps`.
        as_reference: gives a context in which the model computes what the reference does; a fresh
            adapter is off there.
    Raises:
        ValueError: one of them is not finite.
    """
    data = data_hash(pairs, with_labels=False)
    scored = "" if tail == 1.0 else f" tail {tail!r}"
    key = hashlib.sha256(f"{model_hash}{data}{scored}".encode()).hexdigest()[:32]
    file, processes = cache_dir / f"reference-{key}.safetensors", Processes()
    found = by_first(processes, lambda: _read(file, len(pairs)))
    (known,) = processes.agree(lambda: [found is not None], 1)
    if known:
        values = processes.sum(torch.zeros(len(pairs), 2) if found is None else found)
    else:
        parts = ReferenceParts(file.with_suffix(".parts"), len(pairs))
        of_batches = (pad_id, batch_pairs, chunk_tokens, tail)
        reference = compute_reference(
            model, pairs, *of_batches, as_reference=as_reference, parts=parts
        )
        values = torch.tensor([reference.by_id[pair.id] for pair in pairs], dtype=torch.float32)
        wrong = [p.id for p, ok in zip(pairs, values.isfinite().all(dim=1), strict=True) if not ok]
        if wrong:
            by_first(processes, parts.remove)
            raise ValueError(
                f"`model` gives log-probabilities that are not finite for {len(wrong)} of "
                f"{len(pairs)} pairs, the first {wrong[0]!r}; it would train on NaN: check its "
                "weights and `model.dtype`"
            )
        by_first(processes, lambda: _write(file, values, parts))
    return ReferenceLogps(
        {pair.id: (a, b) for pair, (a, b) in zip(pairs, values.tolist(), strict=True)}
    )


def _read(file: Path, n: int) -> Tensor | None:
    """The cached values [n, 2]; None where there are none, or none that can be used."""
    if not file.exists():
        return None
    try:
        values = load_checked(file).get("logps", torch.empty(0))
        if values.shape != (n, 2) or values.dtype != torch.float32:
            raise DamagedError(f"{file} holds other values")
    except (DamagedError, OSError) as error:
        logger.warning("the reference cache cannot be used and is computed again: %s", error)
        return None
    logger.info("reference log-probabilities of %d pairs: from %s", n, file)
    return values


def _write(file: Path, values: Tensor, parts: ReferenceParts) -> None:
    """Cache the values, and remove the parts; without a cache the run goes on, from memory."""
    try:
        with atomic_file(file) as partial:
            save_checked(partial, {"logps": values})
    except OSError as error:
        logger.warning(
            "reference log-probabilities are not cached, the next run computes them again: %s",
            error,
        )
    else:
        parts.remove()


@torch.no_grad()
def compute_reference(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    pad_id: int,
    batch_pairs: int,
    chunk_tokens: int = 256,
    tail: float = 1.0,
    as_reference: AsReference = adapter_off,
    quiet: bool = False,
    parts: ReferenceParts | None = None,
) -> ReferenceLogps:
    """Reference log-probabilities of `pairs`, not cached; arguments as in `reference_logps`.

    Every process scores its share and gets all. `quiet` shows no progress. `parts` keeps what is
    scored if the process is stopped, and knows what one has scored before.
    """
    processes, place = Processes(), {pair.id: k for k, pair in enumerate(pairs)}
    rank, size = processes.rank, processes.size
    values = torch.full((len(pairs), 2), -torch.inf)
    if parts is not None:
        earlier = by_first(processes, parts.load)
        values = processes.sum(torch.zeros_like(values) if earlier is None else earlier)
    known = (values > -torch.inf).all(dim=1)
    of_each = [micro_batches(pairs, batch_pairs, r, size) for r in range(size)]
    progress = tqdm(total=len(pairs), desc="reference", unit="pair", disable=quiet or rank > 0)
    with evaluating(model), as_reference(model), progress, _kept(parts):
        # A sharded model runs on all processes or on none: they skip the same rounds.
        for groups in zip(*of_each, strict=True):
            group = groups[rank]
            if not all(known[place[pair.id]] for each in groups for pair in each):
                batch = collate(group, pad_id)
                logps = pair_logps(model, batch, chunk_tokens, [tail]).view(2, -1).T.cpu()
                where = [place[id] for id in batch.ids]
                values[where] = logps
                if parts is not None:
                    parts.add(where, logps)
            progress.update(min(size * len(group), len(pairs) - progress.n))
        # Inside: what is freed forgets that another adapter, or none, is about to be switched on.
        free_gathered(model)
    # A pair that two processes have scored, one to fill its last batch, keeps one of the values.
    both = processes.largest(values).tolist()
    return ReferenceLogps({pair.id: (a, b) for pair, (a, b) in zip(pairs, both, strict=True)})


@contextmanager
def _kept(parts: ReferenceParts | None) -> Iterator[None]:
    """Write what is scored when the block ends before its time."""
    finished = False
    try:
        yield
        finished = True
    finally:
        if parts is not None and not finished:
            parts.write()
