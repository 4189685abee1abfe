"""The evaluation of a model: the loss on held-out data, and metrics over the answers it writes.

Read `loss` first, then `answers` with `tool_calls`.
"""

from finetune.evaluation.answers import Answer, evaluate_generation
from finetune.evaluation.loss import GroupLoss, LossResult, evaluate_loss

__all__ = ["Answer", "GroupLoss", "LossResult", "evaluate_generation", "evaluate_loss"]
