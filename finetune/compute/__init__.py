"""The arithmetic of a step, in torch alone: no tokenizer, no file, no library of models."""
