"""The m gradients of a prepared model from one backward pass, and whether that is exact."""
