"""The configuration of a run.

`values` has the kinds of values, `schema` every key with its default and unit. `loading` reads
files and overrides, and `yaml12` is the YAML that they are written in.
"""

from finetune.config.loading import dump_config, load_config
from finetune.config.schema import RunConfig

__all__ = ["RunConfig", "dump_config", "load_config"]
