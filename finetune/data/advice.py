"""What small or odd data does to a run, with what to change. Nothing is printed here."""

from finetune.data.batches.size import ENOUGH_STEPS
from finetune.data.encode import EncodedDataset
from finetune.data.statistics import also_in
from finetune.data.types import IGNORE_INDEX

FEW_HELD_OUT = 20  # examples
_LOOKED_AT = 10_000  # examples whose targets are compared


def advice(
    train: EncodedDataset,
    held_out: EncodedDataset | None,
    *,
    num_steps: int | None,
    per_step: float,
    max_length: int,
) -> list[str]:
    """Return a sentence with what to change for each thing that starves a run or its evaluation.

    `num_steps`: those of the run, of `per_step` examples; None if the user chose their number, or
    for a stream.
    """
    found = []
    if num_steps is not None and num_steps < ENOUGH_STEPS:
        smaller = "" if per_step < 2 else "Set training.batch_size=auto, or raise training.epochs"
        found.append(
            f"the run has {num_steps} step{'s' * (num_steps != 1)}, which is few: each takes about "
            f"{per_step:,.0f} of the {len(train):,} examples. {smaller or 'Raise training.epochs'}"
        )
    if held_out is not None:
        found += _of_held_out(train, held_out)
    counts = train.statistics
    cut, total = counts.truncated, counts.examples + counts.without_target
    if cut * 2 > total:
        found.append(
            f"{cut:,} of {total:,} examples are cut to data.max_length = {max_length}, and a cut "
            "answer does not teach where to end. Raise data.max_length"
        )
    whole = total + counts.dropped
    if counts.dropped * 10 > whole:
        found.append(
            f"{counts.dropped:,} of {whole:,} examples are over data.max_length = {max_length} and "
            "left out. Raise data.max_length, or set data.overlong"
        )
    looked_at = min(len(train), _LOOKED_AT)
    targets = {
        tuple(token for token in train[i].labels if token != IGNORE_INDEX) for i in range(looked_at)
    }
    if len(targets) * 2 < looked_at:
        found.append(
            f"{looked_at:,} examples have {len(targets):,} different answers, so most of what is "
            "learnt repeats. If this is not what the data is for, look at it with finetune inspect"
        )
    return found


def _of_held_out(train: EncodedDataset, held_out: EncodedDataset) -> list[str]:
    found = []
    if len(held_out) < FEW_HELD_OUT:
        found.append(
            f"the held-out data has {len(held_out)} example{'s' * (len(held_out) != 1)}, so its "
            "figures are rough. More data, or data.validation, would make them better"
        )
    if both := also_in(train, held_out):
        found.append(
            f"{both:,} of {len(held_out):,} held-out examples are also in the training data, so "
            "the held-out loss shows what is remembered. Set data.drop_duplicates=true to leave "
            "them out of training"
        )
    return found
