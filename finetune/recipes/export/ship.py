"""The GGUF file of an export, with Ollama's Modelfile, and what its rounding changes."""

import copy
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from finetune.config.schema import GenerationSection
from finetune.display import Display
from finetune.models.describe import context_length
from finetune.models.language_model import evaluating
from finetune.models.llama_cpp.modelfile import modelfile
from finetune.models.llama_cpp.tokens import unlike_transformers
from finetune.models.llama_cpp.write import check_gguf, rounded, write_gguf
from finetune.models.tokenizers import stop_ids
from finetune.recipes.export.source import ExportSource
from finetune.report.card import license_in
from finetune.run.records import DataCounts

MODELFILE = "Modelfile"


def check_shippable(source: ExportSource) -> None:
    """Raise UserError if the model or its tokenizer cannot be written as GGUF."""
    check_gguf(source.model, source.tokenizer)


def gguf_name(source: ExportSource, kind: str) -> str:
    """Return the name of the file."""
    return f"{source.name}-{kind.upper()}.gguf"


def write_shipped(source: ExportSource, model: Any, folder: Path, kind: str) -> None:
    """Write the file and the Modelfile into `folder`. `model`: the plain model."""
    file = gguf_name(source, kind)
    licence = license_in(source.card)
    write_gguf(model, source.tokenizer, folder / file, kind, name=source.name, license=licence)
    settings = source.config.generation if source.config is not None else GenerationSection()
    parameters = {  # all of them: Ollama has defaults of its own
        "temperature": settings.temperature,
        "num_predict": settings.max_new_tokens,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "repeat_penalty": settings.repetition_penalty,
        "repeat_last_n": -1,  # tokens that the penalty looks at: all
    }
    text = modelfile(
        file,
        source.tokenizer,
        source.template_settings,
        stops=[source.tokenizer.decode([token]) for token in stop_ids(model)],
        parameters=parameters,
        system=None if source.run is None else DataCounts.read(source.run).system_prompt,
    )
    (folder / MODELFILE).write_text(text, encoding="utf-8")


@torch.no_grad()
def report_rounding(
    source: ExportSource, dest: Path, kind: str, text: str, display: Display
) -> None:
    """Print what the file is, how to run it, and how far its rounded weights move the logits."""
    file = dest / gguf_name(source, kind)
    model = copy.deepcopy(source.model)
    model.load_state_dict(rounded(source.model, kind), strict=False)
    length = context_length(source.model)
    ids = torch.tensor([source.tokenizer(text).input_ids[:length]], device=model.device)
    with evaluating(source.model), evaluating(model):
        ours, theirs = (each(input_ids=ids).logits[0] for each in (source.model, model))
    difference = float((ours - theirs).abs().max() / ours.abs().max())
    same = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    display.say(
        f"{file}: {file.stat().st_size / 1e6:.0f} MB. Its weights, rounded to {kind}, move a logit "
        f"by at most {difference:.1g} of the largest, and {same:.0%} of the likeliest tokens stay"
    )
    for sentence in unlike_transformers(source.tokenizer):
        display.note(sentence)
    name, made, typed = (quote(str(each)) for each in (source.name, dest / MODELFILE, file))
    display.say(f"run it: ollama create {name} -f {made}, or llama-cli -m {typed}")
