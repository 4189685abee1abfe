"""The factory's optimizers in other libraries' trainers: one module per library, in any order.

`accelerate`, `hugging_face` (transformers and TRL), `lightning`, `ultralytics`: import from the
module of your library. Each is a thin layer over `finetune.optim.build_optimizer`. No module
imports the library that it serves; you pass in what it needs (a trainer, an accelerator, a base
class). Nothing else in the package imports them.
"""
