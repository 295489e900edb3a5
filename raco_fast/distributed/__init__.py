"""Several processes that train one model: what each holds of it, and what they tell each other."""
