"""`finetune export`: a run's model, or any other, as a plain Hugging Face folder."""

from pathlib import Path

import torch

from finetune.display import Display
from finetune.models.describe import context_length
from finetune.models.export import export_model, verify_export
from finetune.recipes.build.look import look_at_export
from finetune.recipes.export.ship import check_shippable, report_rounding, write_shipped
from finetune.recipes.export.source import open_source
from finetune.recipes.export.trim import TrimOptions, trim_source

PROBE = "The quick brown fox jumps over the lazy dog."  # the text whose logits are compared
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_target(
    target: str | Path,
    dest: Path,
    *,
    dtype: str,
    checkpoint: Path | None = None,
    trim: TrimOptions | None = None,
    gguf: str | None = None,
    trust: bool = False,
    display: Display | None = None,
) -> None:
    """Write the model to `dest`, reload it from there, and compare the logits.

    `target`: a run's folder, a model's folder, or a hub name. `dtype` is a key of DTYPES.
    `checkpoint`: write the model of this one, not the run's model/. `trim`: keep only the tokens
    that are used. `gguf`: also write a GGUF file of this kind, with a Modelfile.
    `trust`: run the code that comes with the model. Raises UserError
    if there is no such model, if it cannot be written so, or if `dest` exists.
    """
    display = display or Display()
    run = look_at_export(str(target), dest, checkpoint)
    source = open_source(str(target), run, checkpoint, trust=trust)
    if checkpoint is not None and (trim is not None or gguf is not None):
        source = source.as_plain()
    if gguf is not None:
        check_shippable(source)  # before anything long is done
    if trim is not None:
        source = trim_source(source, trim, display)
    export_model(
        source.model,
        source.tokenizer,
        dest,
        card=source.card,
        dtype=DTYPES[dtype],
        beside=None
        if gguf is None
        else lambda model, folder: write_shipped(source, model, folder, gguf),
    )
    ids = source.tokenizer(PROBE).input_ids[: context_length(source.model)]
    trusted = source.trusted
    difference = verify_export(dest, source.model, ids, trust_remote_code=trusted)
    size = sum(file.stat().st_size for file in dest.rglob("*") if file.is_file())
    whose = "model" if source.run is None else "run"
    moved = (
        f"differ from the {whose}'s by at most {difference:.1g} of the largest"
        if difference
        else f"are equal to the {whose}'s"
    )
    display.say(
        f"{dest}: written in {dtype}, {size / 1e6:,.3g} MB, and reloaded. Its logits {moved}"
    )
    if gguf is not None:
        report_rounding(source, dest, gguf, PROBE, display)
