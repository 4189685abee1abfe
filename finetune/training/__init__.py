"""The training loop: `step` takes one optimizer step, and the trainer repeats it."""
