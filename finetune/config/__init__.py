"""The configuration of a run: `schema` holds every key with its default and unit, `loading` reads files and overrides."""

from finetune.config.loading import dump_config, load_config
from finetune.config.schema import RunConfig

__all__ = ["RunConfig", "dump_config", "load_config"]
