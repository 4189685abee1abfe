"""What several commands are built from: a config becomes data, a model, and all else of a run.

Read in this order:

- `data`, `model`, `vocabulary`, `optimizer`: each turns a section of the config into objects;
- `material`: the first stage of a run, everything without weights;
- `parts`: the second stage, with model and batches;
- `accelerator`: device, precision, and the other processes;
- `evaluator`: the one way to evaluate;
- `target`: a finished run or a model, opened for use;
- `card`: the model card of a run.
"""
