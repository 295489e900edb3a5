"""The dual problem: an m×m Gram matrix and the user's weights in, m coefficients out."""
