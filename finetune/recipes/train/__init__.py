"""`finetune train`. `train` is the command: it builds the parts, takes the steps, and finishes.

`start` claims the folder, `evaluations` measures between the steps, `finish` writes the model, its
card and the report. `launch` runs it in several processes, each of which is a `worker`.
"""
