"""A config becomes a run. Only this room knows the config; all rooms below take plain values.

A file or folder has the name of its command: `train/`, `plan/`, `compare/` (with `tune`), `demo`,
`evaluate`, `generate` (with `chat`), `translate`, `inspect`, `export`, `optimizers`. `build/` has
what several of them share; start there.
"""
