"""`finetune`: fine-tune small causal language models; vocabulary rows that a run does not use cost nothing."""
