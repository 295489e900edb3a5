"""raco_fast: several conflicting preferences at the price of one."""
