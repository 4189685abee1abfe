"""Communication between the processes of a run that torch's own engines do not cover.

`engines` decides which of torch's engines wraps the model (DDP, FSDP2, none). `row_gradients`
averages the row-sparse gradients of lazily stepped tables. `sharding` reads a model whose
parameters FSDP2 shards.
"""

from finetune.distributed.row_gradients import RowGradients, keep_tables_out_of_ddp

__all__ = ["RowGradients", "keep_tables_out_of_ddp"]
