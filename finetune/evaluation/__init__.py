"""Reading a model: loss over held-out data, metrics over generated text."""

from finetune.evaluation.loss import LossResult, evaluate_loss
from finetune.evaluation.text import Answer, evaluate_generation

__all__ = ["Answer", "LossResult", "evaluate_generation", "evaluate_loss"]
