"""Which embeddings of a model `lazy_adamw` may update row by row.

Floor 1. A table is row-sparse only where nothing but the lookup reads it: a table tied to the output head takes part in every
logit, so every row has a gradient at every step.
"""

import logging

from torch import nn

logger = logging.getLogger("finetune")


def row_sparse_embeddings(model: nn.Module) -> list[nn.Embedding]:
    """The input embedding of `model` where it is trainable and untied; of a model that does not name one, every such
    nn.Embedding.

    (A position embedding beside a named input embedding stays dense: a batch uses nearly all of its rows.) Says in the log of
    "finetune" why a table is not among them: a warning for a tied one, a note for a frozen one.
    """
    names = {module: name for name, module in model.named_modules()}
    chosen = []
    for embedding in _candidates(model):
        others = [names[module] for module in _also_holding(model, embedding)]
        if getattr(embedding, "compact", False):
            logger.info(
                "lazy_adamw: all rows of the compact embedding %r are in use, so it is updated densely",
                names[embedding],
            )
        elif not embedding.weight.requires_grad:
            logger.info(
                "lazy_adamw: the embedding %r is frozen, so there are no rows to update",
                names[embedding],
            )
        elif others:
            logger.warning(
                "lazy_adamw: the embedding %r shares its weight with %s, so every row has a gradient and is updated, as by adamw; "
                "where few of them are used, the active vocabulary trains only those",
                names[embedding],
                ", ".join(repr(other) for other in others),
            )
        else:
            chosen.append(embedding)
    return chosen


def _candidates(model: nn.Module) -> list[nn.Embedding]:
    """What `get_input_embeddings` names, looking into wrappers such as PEFT's `modules_to_save`, which keep a frozen copy
    beside."""
    get_embedding = getattr(model, "get_input_embeddings", None)
    named = get_embedding() if callable(get_embedding) else None
    root = named if isinstance(named, nn.Module) else model
    found = [module for module in root.modules() if isinstance(module, nn.Embedding)]
    return [module for module in found if module.weight.requires_grad] or found


def _also_holding(model: nn.Module, embedding: nn.Embedding) -> list[nn.Module]:
    """The other modules that hold this weight: the same parameter, or another one over the same memory."""
    memory = embedding.weight.untyped_storage().data_ptr()
    return [
        module
        for module in model.modules()
        if module is not embedding
        for parameter in module.parameters(recurse=False)
        if parameter is embedding.weight
        or (memory and parameter.untyped_storage().data_ptr() == memory)
    ]
