"""One process of a run that `launch` started: `python -m finetune.recipes.train.worker TASK`.

An error is recorded for the launcher, which reports it once, and not printed by every process.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from finetune.config import load_config
from finetune.errors import UserError, disk_refusal, print_chain
from finetune.recipes.train.launch import SIGNALLED, USER_ERROR
from finetune.recipes.train.train import run_training


def work(task: Mapping[str, Any]) -> int:
    """Do this process's part of the run, and return the exit code."""
    sys.argv = list(task["command"])  # for environment.json
    try:
        config = load_config(Path(task["config"]))
        stopped = run_training(config, resume=task["resume"], dry_run=task["dry_run"])
    except KeyboardInterrupt:  # before the first step
        return SIGNALLED
    except Exception as error:
        if isinstance(error, OSError) and (said := disk_refusal(error)) is not None:
            error = UserError(said)
        print_chain(error)
        is_mistake = isinstance(error, UserError)
        ErrorHandler().record_exception(UserError(str(error)) if is_mistake else error)
        return USER_ERROR if is_mistake else 1
    return SIGNALLED if stopped == "signal" else 0


if __name__ == "__main__":
    sys.exit(work(json.loads(sys.argv[1])))
