"""Reference log-probabilities, computed once and cached.

The reference model is the policy before training, so no second model stays in memory. They are
cached on disk under a hash of everything they depend on: the weights, what is scored, the token ids
of every pair, which follow from the data, the tokenizer, the chat template and the truncation, and
the micro-batches that they are scored in.

The last is for rounding alone. A pair that is scored with other pairs beside it has other
roundings, in bfloat16 some tenths of a nat of a margin; the reference is scored in the very rows
that a training step will have, so that they cancel. A run that is resumed with other micro-batches
takes what there is.

Of several processes each scores its share, and the first reads and writes the cache. Several runs
may use one cache at the same time: of those that would score the same, one does, and the others
wait for it.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from raco_fast.distributed.processes import Processes
from raco_fast.dpo.data.layout import Layout, Round
from raco_fast.dpo.data.tokenization import EncodedPair
from raco_fast.dpo.modes import evaluating
from raco_fast.dpo.run.checksums import DamagedError, load_checked, save_checked
from raco_fast.dpo.run.files import atomic_file
from raco_fast.dpo.run.reference_parts import ReferenceParts
from raco_fast.dpo.run.reference_turns import turn
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
    rounds: Sequence[Round],
    layout: Layout,
    *,
    model_hash: str,
    cache_dir: Path,
    chunk_tokens: int,
    tails: Sequence[float] = (1.0,),
    as_reference: AsReference = adapter_off,
    any_rounds: bool = False,
) -> dict[float, ReferenceLogps]:
    """Reference log-probabilities of `pairs`, from the cache or computed and cached.

    Args:
        model: the model before training.
        pairs: encoded pairs with unique ids.
        rounds: the micro-batches that they are scored in; every pair is in one of them.
        layout: how a micro-batch lies in memory.
        model_hash: `raco_fast.dpo.models.fingerprint` of what the reference computes.
        cache_dir: created where missing. Where it cannot be written, the log says so and nothing
            is cached.
        chunk_tokens: as in `sequence_logps`.
        tails: as in `pair_logps`.
        as_reference: gives a context in which the model computes what the reference does; a fresh
            adapter is off there.
        any_rounds: whether values that are cached of other micro-batches will do.
    Returns:
        Tail weight -> the log-probabilities of all pairs.
    Raises:
        ValueError: one of them is not finite.
    """
    data = data_hash(pairs, with_labels=False)
    key, shape = _digest(f"{model_hash}{data}{tails!r}"), (len(pairs), 2 * len(tails))
    of_rounds = _digest(f"{layout.kind}{_places(pairs, rounds)}")
    file, processes = cache_dir / f"reference-{key}-{of_rounds}.safetensors", Processes()
    parts = ReferenceParts(file.with_suffix(".parts"), shape)
    with ExitStack() as until_cached:
        # Several processes wait for no other run: the collective of all but the first times out.
        if processes.size == 1 and not file.exists():
            until_cached.enter_context(turn(parts.folder))
        found = by_first(processes, lambda: _read(_cached(file, key, any_rounds), shape))
        (known,) = processes.agree(lambda: [found is not None], 1)
        if known:
            by_first(processes, parts.remove)
            values = processes.sum(torch.zeros(shape) if found is None else found)
            return _by_tail(pairs, values, tails)
        values = _scored(model, pairs, rounds, layout, chunk_tokens, tails, as_reference, parts)
        wrong = [p.id for p, ok in zip(pairs, values.isfinite().all(dim=1), strict=True) if not ok]
        if wrong:
            by_first(processes, parts.remove)
            raise ValueError(
                f"`model` gives log-probabilities that are not finite for {len(wrong)} of "
                f"{len(pairs)} pairs, the first {wrong[0]!r}; it would train on NaN: check its "
                "weights and `model.dtype`"
            )
        by_first(processes, lambda: _write(file, values, parts))
        return _by_tail(pairs, values, tails)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _places(pairs: Sequence[EncodedPair], rounds: Sequence[Round]) -> list[list[list[int]]]:
    """Which pairs are scored together, by their place among all."""
    place = {pair.id: k for k, pair in enumerate(pairs)}
    return [[[place[pair.id] for pair in group] for group in each] for each in rounds]


def _by_tail(
    pairs: Sequence[EncodedPair], values: Tensor, tails: Sequence[float]
) -> dict[float, ReferenceLogps]:
    """Of values [n, 2 * tails]."""
    found = {}
    for tail, both in zip(tails, torch.split(values, 2, dim=1), strict=True):
        rows = zip(pairs, both.tolist(), strict=True)
        found[tail] = ReferenceLogps({pair.id: (a, b) for pair, (a, b) in rows})
    return found


def _cached(file: Path, key: str, any_rounds: bool) -> Path:
    """The file of these micro-batches, or else one of others where that will do."""
    others = sorted(file.parent.glob(f"reference-{key}-*.safetensors")) if any_rounds else []
    if file.exists() or not others:
        return file
    logger.info("reference log-probabilities were scored in other micro-batches than those now")
    return others[0]


def _read(file: Path, shape: tuple[int, int]) -> Tensor | None:
    """The cached values; None where there are none, or none that can be used."""
    if not file.exists():
        return None
    try:
        values = load_checked(file).get("logps", torch.empty(0))
        if values.shape != shape or values.dtype != torch.float32:
            raise DamagedError(f"{file} holds other values")
    except (DamagedError, OSError) as error:
        logger.warning("the reference cache cannot be used and is computed again: %s", error)
        return None
    logger.info("reference log-probabilities of %d pairs: from %s", len(values), file)
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


def compute_reference(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    layout: Layout,
    chunk_tokens: int = 256,
    tails: Sequence[float] = (1.0,),
    as_reference: AsReference = adapter_off,
) -> Mapping[float, ReferenceLogps]:
    """Reference log-probabilities of `pairs`, not cached; arguments as in `reference_logps`."""
    rounds = layout.rounds(pairs, Processes().size)
    of_run = (rounds, layout, chunk_tokens, tails, as_reference, None)
    return _by_tail(pairs, _scored(model, pairs, *of_run), tails)


@torch.no_grad()
def _scored(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    rounds: Sequence[Round],
    layout: Layout,
    chunk_tokens: int,
    tails: Sequence[float],
    as_reference: AsReference,
    parts: ReferenceParts | None,
) -> Tensor:
    """float32 [n, 2 * tails]: every process scores its share and gets all.

    Args:
        parts: keeps what is scored if the process is stopped, and knows what one has scored before.
            None shows no progress either.
    """
    processes, place = Processes(), {pair.id: k for k, pair in enumerate(pairs)}
    rank = processes.rank
    values = torch.full((len(pairs), 2 * len(tails)), -torch.inf)
    if parts is not None:
        earlier = by_first(processes, parts.load)
        values = processes.sum(torch.zeros_like(values) if earlier is None else earlier)
    known = (values > -torch.inf).all(dim=1)
    quiet = parts is None or rank > 0
    progress = tqdm(total=len(pairs), desc="reference", unit="pair", disable=quiet)
    with evaluating(model), as_reference(model), progress, _kept(parts):
        # A sharded model runs on all processes or on none: they skip the same rounds.
        for groups in rounds:
            group = groups[rank]
            if not all(known[place[pair.id]] for each in groups for pair in each):
                batch = layout.batch(group)
                logps = pair_logps(model, batch, chunk_tokens, tails).view(-1, len(group)).T.cpu()
                where = [place[id] for id in batch.ids]
                values[where] = logps
                if parts is not None:
                    parts.add(where, logps)
            progress.update(min(sum(map(len, groups)), len(pairs) - progress.n))
        # Inside: what is freed forgets that another adapter, or none, is about to be switched on.
        free_gathered(model)
    # A pair that two processes have scored, one to fill its last batch, keeps one of the values.
    return processes.largest(values)


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
