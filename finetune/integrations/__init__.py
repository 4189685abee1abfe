"""The factory's optimizers in other people's trainers; one module a library, each a few lines over `build_optimizer`.

Floor 2. No module here imports the library that it serves: what they need is handed to them (a trainer, an accelerator, a base
class). Nothing else in the package imports them.
"""
