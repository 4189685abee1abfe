"""The tiny models of `tests.inference`."""

from tests.inference.conftest import any_model, llama, tokenizer

__all__ = ["any_model", "llama", "tokenizer"]
