"""`PassCount`: which backward pass is likely to be the last one before a step.

A pass cannot know whether another micro-batch follows it, after which products of its gradients are
worth nothing. Steps are alike, so the step before tells; where it is wrong, products are taken in
vain, or by the step as if there had been none.
"""


class PassCount:
    """Counts passes, and how many the last step was made of; one at first."""

    def __init__(self) -> None:
        self._usual, self._now = 1, 0

    def begin(self) -> bool:
        """Count a pass; whether it is as many as the step before was made of."""
        self._now += 1
        return self._now == self._usual

    def stepped(self) -> None:
        """Note that a step takes the gradients; of a second one along them nothing is learnt."""
        if self._now:
            self._usual, self._now = self._now, 0

    def forget(self) -> None:
        """Note that the gradients are gone, with or without a step."""
        self._now = 0
