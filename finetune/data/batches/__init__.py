"""Batches: examples become the micro-batches of each optimizer step.

Read `packing`, `size` (how many sequences a step has), `steps` (which ones, and whose they are) and
`collate` (their tensors), then the two sources of batches: `dataset` holds its examples in memory,
`stream` reads on and on. `BatchShape` and `StepBatch` are in `steps`.
"""
