"""Reading a model: loss over held-out data, metrics over generated text."""

from finetune.evaluation.answers import Sample, evaluate_generation
from finetune.evaluation.loss import LossResult, evaluate_loss

__all__ = ["LossResult", "Sample", "evaluate_generation", "evaluate_loss"]
