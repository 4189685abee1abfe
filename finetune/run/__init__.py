"""A run's folder and its records, which no other room opens.

Other rooms write checkpoints, model/, report.html and bad_batch.pt, at the paths in `folder`.

Read in this order:

- `folder`: the paths;
- `records`: each a dataclass with `read` and `write`; those of a comparison are in `trials`;
- `log`: what grows during a run;
- `metrics`: the names and units of the figures;
- `environment`: how that record is made;
- `files`: how a record is replaced, whole or not at all;
- `wording`: durations, sizes and lists in words.
"""
