"""Many runs of one config, and what they come to: sweeps, fronts, intervals, pictures."""
