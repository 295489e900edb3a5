"""`output_dir/base`: the base of the trained adapter, where nothing else on disk is that model.

An adapter names its base, and a model that was unpacked from a GGUF file, or into which another
adapter was merged, has no name. It is written before training, so that a full disk is noticed then.
Beside it, not merged with the adapter: rounded sums of both would not be what was trained.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from raco_fast.dpo.run.files import atomic_folder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
_FINGERPRINT = "fingerprint.txt"


def keep_base(
    output_dir: Path,
    model: PreTrainedModel,
    fingerprint: str,
    weights: Mapping[str, Tensor] | None = None,
    *,
    writes: bool,
) -> str:
    """Save `model` to `output_dir/base` if it is not there yet.

    Args:
        fingerprint: `raco_fast.dpo.models.fingerprint` of the model.
        weights: by the names that its files have; None: those of the model.
        writes: of several processes one does.
    Returns:
        The folder's absolute path, which a saved adapter names.
    Raises:
        OSError: it could not be written whole.
    """
    folder = (output_dir / "base").absolute()
    known = folder / _FINGERPRINT
    if writes and not (known.is_file() and known.read_text(encoding="utf-8") == fingerprint):
        with atomic_folder(folder) as partial:
            model.save_pretrained(partial, state_dict=weights)
            (partial / _FINGERPRINT).write_text(fingerprint, encoding="utf-8")
        logger.info("the base of the adapter to be trained is saved as %s", folder)
    return str(folder)
