"""Answers from a model: batched generation, a chat, and the translation of lines.

Read `generation` first: it draws tokens for a batch of prompts. `conversation` and `translation`
make prompts and hand them to it. The settings of an answer are one `GenerationSettings`.
"""
