"""`finetune plan`: memory, time and disk of a run, before it is started.

`plan` is the command. `planner` works out the memory on a model without weights, and `memory` has
the arithmetic for it. `timing` takes a few real steps, and `tables` prints the plan.
"""
