"""Comparing optimizers fairly: pure functions from the records of runs to a verdict.

Read in this order:

- `grids`: which learning rates are tried;
- `statistics`: means with intervals;
- `verdict`: who won;
- `summary`: everything as one dictionary;
- `frequency`: losses by how frequent a token is.

Tuning on one seed and reporting on others follows DeepOBS (https://arxiv.org/abs/1903.05499). That
every optimizer gets its own grid and the same number of trials follows Choi et al.
(https://arxiv.org/abs/1910.05446).
"""
