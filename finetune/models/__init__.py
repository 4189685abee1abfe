"""Borders to transformers and peft: loading, tokenizers, adapters, export."""
