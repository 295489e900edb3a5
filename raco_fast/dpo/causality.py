"""Whether a model predicts a token from the tokens before it alone."""

import torch
from torch import Tensor, nn

from raco_fast.dpo.decoders import unwrap
from raco_fast.dpo.load_errors import LoadErrors
from raco_fast.dpo.modes import evaluating
from raco_fast.dpo.sharded import free_gathered


@torch.no_grad()
def check_causal(model: nn.Module, input_ids: Tensor) -> None:
    """Change the second half of a row: what is predicted in the first may not move.

    Args:
        model: as in `sequence_logps`.
        input_ids: int64 [T] on its device, T at least 2; 64 tokens are used.
    Raises:
        ValueError: it moves, as an encoder's predictions do, which sees the tokens that it is to
            predict; or the model cannot be run.
    """
    causal_lm = unwrap(model)
    known, name = causal_lm.get_input_embeddings().weight.shape[0], type(causal_lm).__name__
    row = input_ids[None, :64]
    half = (row.shape[1] + 1) // 2
    other = row.clone()
    other[:, half:] = (row[:, half:] + 1) % known
    cure = "use a model whose config.json belongs to its weights"
    with LoadErrors("model", name, cure), evaluating(model):
        ours, theirs = (
            model(input_ids=ids, use_cache=False).logits[0, :half].float() for ids in (row, other)
        )
    free_gathered(model)
    moved, size = (ours - theirs).abs().max(), ours.abs().max()
    # A matrix product of the same shape rounds each row alike; a later token moves far more.
    tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 2e-2
    if moved > tolerance * size:
        raise ValueError(
            f"`model` ({name}) predicts tokens from those after them (changing those moves its "
            f"logits by {float(moved):.3g}), so it is no causal language model; use one "
            f"that is, of the kind *ForCausalLM"
        )
