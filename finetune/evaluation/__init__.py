"""Reading a model: loss over held-out data, metrics over generated text."""

from finetune.evaluation.loss import LossResult, evaluate_loss
from finetune.evaluation.text import Sample, evaluate_generation

__all__ = ["LossResult", "Sample", "evaluate_generation", "evaluate_loss"]
