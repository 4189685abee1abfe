"""What a run says of its model: the model card, and the command that tries it."""

from collections.abc import Mapping
from shlex import quote
from typing import Any

from finetune.config import RunConfig, dump_config
from finetune.models.locate import resolve_name
from finetune.report.card import license_of, model_card
from finetune.run.folder import RunDir
from finetune.run.metrics import METRICS
from finetune.run.records import DataCounts, Environment, Vocabulary

TRIES = {"translation": "translate", "text": "generate"}  # format of the data -> command


def run_card(run: RunDir, config: RunConfig, evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the model card of a run, from its records. `evaluations`: when -> the figures then."""
    name = config.model.name
    shown = [
        metric for metric in METRICS if all(metric.key in record for record in evaluations.values())
    ]
    kind = DataCounts.read(run).format
    return model_card(
        title=run.root.resolve().name,
        base_model=name,
        license=license_of(resolve_name(name, revision=config.model.revision))
        if name is not None
        else None,
        data=[
            *(source.path + (f" ({kind})" if kind else "") for source in config.data.train),
            *([f"vocabulary: {chosen}"] if (chosen := Vocabulary.read(run).chosen) else []),
        ],
        metrics={
            when: {metric.name: metric.value(record) for metric in shown}
            for when, record in evaluations.items()
        },
        config=dump_config(config),
        command=Environment.read(run).command,
        kind=kind,
    )


def how_to_try(run: RunDir) -> str:
    """Return the command that tries the run's model."""
    return f"finetune {TRIES.get(DataCounts.read(run).format or '', 'chat')} {quote(str(run.root))}"
