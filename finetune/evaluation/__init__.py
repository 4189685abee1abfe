"""Reading a model: loss over held-out data, metrics over generated text."""
