"""BatchNorm's statistics: found, read, corrected, estimated, kept apart by domain, merged over processes.

`layers` finds and reads; `moments` merges exactly; `running`, `population`, `synchronized` and `domains` act.
"""

from training.normalization.layers import batch_norms, initial_share, norm_records

__all__ = ["batch_norms", "initial_share", "norm_records"]
