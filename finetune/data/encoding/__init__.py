"""Texts become tokens and labels, many at a time, and are kept on disk."""
