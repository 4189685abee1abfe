"""The active vocabulary of a model: its tables made compact, shown whole for a while, given back.

`activate_vocabulary` makes the weight of the input embedding (and of the output head, tied or not)
a compact parameter [A, d], whose row i belongs to token `active_ids[i]`. The other rows are kept
apart and frozen, so the model still reads and predicts every token. They cost no gradient and no
optimizer state. Token ids, tokenizer, config and the names of the parameters stay as they were. The
classes of the two modules are changed in place to ones whose lookup and product know the place of
each token's row. A subclass with a forward of its own (Gemma's scaled embedding) keeps it.
`full_vocabulary` shows the model with its full table for a while; `save_pretrained` does so by
itself. `deactivate_vocabulary` gives the full table back for good.

The shift. An optimizer whose steps do not follow the gradient's scale (AdamW) also moves rows that
get almost no gradient, each by about lr a step and against the hidden states. So training the whole
table takes probability from unused tokens. Frozen rows cannot move. But the softmax depends on
differences only, so the active rows can move the other way together. `shift` [d] is added to each
of them, in the lookup and in the product, and trains at the same learning rate. Its gradient comes
from the product alone: minus the sum of the gradients of the unused rows, which are never looked
up.

A table may have room for `spare` rows that belong to no token yet. `ActiveVocabulary.grow` gives
them to tokens that turn up later.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.compute.subclass import derived_class
from finetune.errors import UserError
from finetune.models.describe import token_tables
from finetune.models.vocabulary.rows import NO_TOKEN, ActiveEmbedding, ActiveHead, ActiveVocabulary


def activate_vocabulary(
    model: PreTrainedModel,
    ids: Iterable[int],
    *,
    spare: int = 0,
    compact_input: bool = True,
    shift: bool = True,
    frozen_dtype: torch.dtype | None = None,
) -> None:
    """Train only the rows of `ids` in the token table of `model`, in place.

    A tied table stays tied. In an untied model the head is made compact, and with `compact_input`
    also the input embedding. Without it the input stays whole: unused rows cost lazy_adamw nothing.
    `spare`: rows kept for tokens that turn up later. `shift`: see above. Leave it out for an
    optimizer whose steps follow the gradient's scale (SGD, with or without momentum): the sum of
    all rows' gradients is far too long a step for it. `frozen_dtype`: that of the products under
    autocast. The frozen rows are kept in it if that loses no bit of them (weights from a bfloat16
    file), else in their own dtype.

    Raises UserError if an id is not in the table, if the model has active rows already, or if its
    head is of an unknown kind.
    """
    if active_modules(model):
        raise UserError(
            "the model has an active vocabulary already. Give it its full table back first, with "
            "deactivate_vocabulary"
        )
    given = set(ids)
    if not all(isinstance(i, int) for i in given):
        raise UserError(
            "the active vocabulary takes token ids as a list of Python ints, and was given "
            f"{given!r:.60}"
        )
    wanted = torch.tensor(sorted(given), dtype=torch.int64)
    if (reason := why_not_active(model)) is not None:
        raise UserError(
            f"no active vocabulary: {reason}; its table trains whole (vocabulary.mode=full)"
        )
    table, head = token_tables(model)
    if not len(wanted) or int(wanted[0]) < 0 or int(wanted[-1]) >= len(table):
        raise UserError(
            f"the active vocabulary needs token ids from 0 to {len(table) - 1}, and at least one "
            "of them"
        )
    embedding: Any = model.get_input_embeddings()
    output = model.get_output_embeddings()
    kept: dict[str, Any] = {"spare": spare, "frozen_dtype": frozen_dtype}
    model.save_pretrained = functools.partial(_save_whole, model)  # type: ignore[method-assign]
    model.resize_token_embeddings = _refuse_resize  # type: ignore[method-assign]
    if head is table:
        vocabulary = ActiveVocabulary(
            table, wanted, padding_idx=embedding.padding_idx, shift=shift, **kept
        )
        weight = _compact(table, vocabulary)
        _make_active(embedding, ActiveEmbedding, vocabulary, weight)
        _make_active(output, ActiveHead, vocabulary, weight)
        return
    assert head is not None
    vocabulary = ActiveVocabulary(head, wanted, padding_idx=None, shift=shift, **kept)
    _make_active(output, ActiveHead, vocabulary, _compact(head, vocabulary))
    if compact_input:
        vocabulary = ActiveVocabulary(table, wanted, padding_idx=embedding.padding_idx, **kept)
        _make_active(embedding, ActiveEmbedding, vocabulary, _compact(table, vocabulary))


def activate_as_saved(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Make the tables of `model` as compact as they were when `state` was taken.

    The state dict can then be loaded into it.
    """
    saved = {
        name: value for name, value in state.items() if name.endswith(".vocabulary.active_ids")
    }
    if saved:
        ids, names = next(iter(saved.values())), dict(model.named_modules())
        embedding = next(
            name for name, module in names.items() if module is model.get_input_embeddings()
        )
        compact_input = any(name.endswith(embedding + ".vocabulary.active_ids") for name in saved)
        shift = any(name.endswith(".vocabulary.shift") for name in state)
        options: dict[str, Any] = {
            "spare": int((ids == NO_TOKEN).sum()),
            "compact_input": compact_input,
            "shift": shift,
        }
        activate_vocabulary(model, ids[ids != NO_TOKEN].tolist(), **options)


def why_not_active(model: PreTrainedModel) -> str | None:
    """Return why the table of `model` can only train whole; None if it need not.

    It need not if the model has a plain embedding and a linear head without a bias.
    """
    head, name = model.get_output_embeddings(), type(model).__name__
    is_product = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    if not is_product or not isinstance(model.get_input_embeddings(), nn.Embedding):
        return f"{name} has no plain embedding with a linear output head"
    return f"the output head of {name} has a bias" if head.bias is not None else None


def active_modules(model: nn.Module) -> list[Any]:
    """Return the modules of `model` with a compact weight: none, head, or embedding and head."""
    return [
        module for module in model.modules() if isinstance(module, ActiveEmbedding | ActiveHead)
    ]


@contextmanager
def full_vocabulary(model: nn.Module) -> Iterator[None]:
    """Make `model` the plain model with its full table for a while, tied as it was.

    What is written to the full table is lost. Costs the memory of a full table; of two if input and
    output are not tied.
    """
    modules = active_modules(model)
    kept = [(module, type(module), module.weight, module.vocabulary) for module in modules]
    _make_plain(modules)
    try:
        yield
    finally:
        for module, cls, weight, vocabulary in kept:
            module.__class__, module.weight, module.vocabulary = cls, weight, vocabulary
            _count(module, len(weight))


def deactivate_vocabulary(model: nn.Module) -> None:
    """Give `model` its full table back, in place, tied as it was.

    The rows of frozen tokens are bit for bit what they were.
    """
    _make_plain(active_modules(model))
    for part in model.modules():
        part.__dict__.pop("save_pretrained", None)
        part.__dict__.pop("resize_token_embeddings", None)


def _save_whole(model: PreTrainedModel, *args: Any, state_dict: Any = None, **kwargs: Any) -> None:
    """Save the plain model. A `state_dict` of the compact weights is left out."""
    kwargs["state_dict"] = None if active_modules(model) else state_dict
    with full_vocabulary(model):
        type(model).save_pretrained(model, *args, **kwargs)


def _refuse_resize(*args: Any, **kwargs: Any) -> Any:
    raise UserError(
        "the model has an active vocabulary: resize its table before activate_vocabulary, or after "
        "deactivate_vocabulary"
    )


def _make_plain(modules: Iterable[Any]) -> None:
    tables: dict[int, nn.Parameter] = {}  # a shared weight stays shared
    for module in modules:
        weight, vocabulary = module.weight, module.vocabulary
        if id(weight) not in tables:
            tables[id(weight)] = nn.Parameter(
                vocabulary.full_table(weight), requires_grad=weight.requires_grad
            )
        del module.vocabulary
        module.__class__, module.weight = module.plain_class, tables[id(weight)]
        _count(module, len(tables[id(weight)]))


def _compact(table: Tensor, vocabulary: ActiveVocabulary) -> nn.Parameter:
    ids = vocabulary.active_ids
    return nn.Parameter(
        table.detach().index_select(0, ids.clamp(min=0)).masked_fill_((ids == NO_TOKEN)[:, None], 0)
    )


def _make_active(module: Any, cls: Any, vocabulary: ActiveVocabulary, weight: nn.Parameter) -> None:
    plain: Any = type(module)
    bases = (cls,) if plain in (nn.Embedding, nn.Linear) else (plain, cls)
    module.__class__ = derived_class(f"Active{plain.__name__}", bases, plain_class=plain)
    module.weight, module.vocabulary = weight, vocabulary
    _count(module, len(weight))


def _count(module: Any, rows: int) -> None:
    """Set the number of rows that nn.Embedding and nn.Linear report when they are printed."""
    if isinstance(module, nn.Embedding):
        module.num_embeddings = rows
    else:
        module.out_features = rows
