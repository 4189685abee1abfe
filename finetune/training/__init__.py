"""The training loop. It uses what it is given and builds nothing.

Read in this order:

- `step`: one optimizer step;
- `cadence`: how far a run is, and when it evaluates and saves;
- `trainer`: steps, evaluations, checkpoints, resume;
- `checkpoint` with `shards`: what is on the disk;
- `stopping`: signals and divergence;
- `vocabulary`: rows for new tokens, and frozen rows that are drawn.
"""
