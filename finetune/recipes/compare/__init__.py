"""`finetune compare` and `finetune tune`: optimizers, each at its own best learning rate.

`compare` and `tune` are the commands. `study` is what they share: the protocol and the search.
`candidates` chooses the optimizers, `data` holds data out, `trial` is one run, and `outcome` writes
the comparison. The statistics are in `finetune.comparison`.
"""
