"""From coefficients to an update: the optimizer, and the combined gradient for any other."""
