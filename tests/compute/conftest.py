"""The tiny models of `tests.models`."""

from tests.models.conftest import make_model

__all__ = ["make_model"]
