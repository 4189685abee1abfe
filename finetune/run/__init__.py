"""A run's folder and its records; no other room opens them.

Training leaves the records here; the report, the model card and later commands read them here. Other
rooms write checkpoints, model/, report.html and bad_batch.pt at the paths that `folder` names.

Read in this order: `folder` (what lies where), `records` (each one a dataclass with `read` and
`write`), `log` (what grows while a run goes on), `metrics` (the names and units of the figures),
`environment` (how that record is made), `files` (how a record is replaced, whole or not at all),
`wording` (durations, sizes and lists in words).
"""
