"""Multi-objective DPO: scores of preference pairs, their losses and their metrics."""

from raco_fast.dpo.data.packed_rows import PackedRows, pair_rows
from raco_fast.dpo.packed import packed_logps

__all__ = ["PackedRows", "packed_logps", "pair_rows"]
