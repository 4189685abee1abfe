"""Comparing optimizers fairly: grids of learning rates, statistics over seeds, the verdict. Pure functions over runs' records.

Floor 1. The protocol follows DeepOBS (https://arxiv.org/abs/1903.05499) in tuning on one seed and reporting on others, and Choi et
al. (https://arxiv.org/abs/1910.05446) in tuning every optimizer, each on a grid of its own, with the same number of trials.
"""
