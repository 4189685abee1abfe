"""What processes of one run tell each other beside what torch's engines do.

Floor 2.
"""

from finetune.distributed.row_gradients import RowGradients, keep_tables_out_of_ddp

__all__ = ["RowGradients", "keep_tables_out_of_ddp"]
