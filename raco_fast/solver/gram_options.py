"""Which Gram matrix is solved: of the batch or the expected gradients, in which metric."""

import math
from dataclasses import dataclass

GRAMS = ("batch", "unbiased")
C_MODES = ("batch", "signal")
METRICS = ("euclidean", "adam")


@dataclass(frozen=True)
class GramOptions:
    """What coefficients are found from.

    Args:
        gram: "batch": the Gram matrix M of a step's gradients, as in the paper; "unbiased": an
            estimate of that of their expectation (`expected_gram.py`).
        gram_ema: of "unbiased": what one step keeps of the average over the steps before, in
            (0, 1); None: chosen from the noise, as an average over 20 to 200 steps.
        c_mode: of "unbiased": the two norms in the length of CAGrad's correction, c ‖g0‖ / ‖G̃p‖,
            are those of the "batch" or of the "signal", the estimate.
        metric: of the products: "euclidean", as in the paper; "adam", that of AdamW's update, of
            "batch" and of an optimizer's own step only.
    Raises:
        TypeError, ValueError: an argument breaks a rule above.
    """

    gram: str = "batch"
    gram_ema: float | None = None
    c_mode: str = "batch"
    metric: str = "euclidean"

    def __post_init__(self) -> None:
        """Check them."""
        if self.gram not in GRAMS:
            raise ValueError(
                f"`gram` must be 'batch' (the Gram matrix of a step's gradients) or 'unbiased' (of "
                f"their expectation), got {self.gram!r}"
            )
        if self.c_mode not in C_MODES:
            raise ValueError(f"`c_mode` must be 'batch' or 'signal', got {self.c_mode!r}")
        if self.metric not in METRICS:
            raise ValueError(
                f"`metric` must be 'euclidean' or 'adam' (of AdamW's update), got {self.metric!r}"
            )
        if self.metric == "adam" and self.gram == "unbiased":
            raise ValueError(
                "`metric` must be 'euclidean' with gram='unbiased', got 'adam': what samples have "
                "with themselves is found in the backward pass, without the weights of single "
                "elements; set gram='batch' or metric='euclidean'"
            )
        if self.gram_ema is not None:
            _check_ema(self.gram_ema)
        if self.gram == "batch" and (self.gram_ema is not None or self.c_mode != "batch"):
            raise ValueError(
                f"`gram_ema` and `c_mode` are of gram='unbiased', got gram_ema={self.gram_ema} and "
                f"c_mode={self.c_mode!r} with gram='batch'; leave them out, or set "
                f"gram='unbiased'"
            )

    @property
    def unbiased(self) -> bool:
        """Whether the Gram matrix of the expectation is estimated."""
        return self.gram == "unbiased"


def _check_ema(gram_ema: float) -> None:
    try:
        value = math.fsum((gram_ema,))  # refuses strings, which float() would read
    except (TypeError, ValueError):
        raise TypeError(
            f"`gram_ema` must be a number or None, got {gram_ema!r}; 0.95 is usual"
        ) from None
    if not 0.0 < value < 1.0:
        raise ValueError(
            f"`gram_ema` must be in (0, 1), got {value}; 0.95 averages over about 40 steps, None "
            f"chooses it from the noise"
        )
