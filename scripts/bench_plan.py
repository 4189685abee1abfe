"""Compare what `finetune plan` says of memory with what runs take, in many modes.

    python scripts/bench_plan.py                                  # both demos, all modes, fp32
    python scripts/bench_plan.py --tasks chat --modes full,lora --precision bf16

Each run takes two steps of a demo in a process of its own, and its plan is made in another.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

MODES = {
    "auto": [],
    "full": ["vocabulary.mode=full"],
    "active": ["vocabulary.mode=active"],
    "sampled": ["vocabulary.mode=sampled"],
    "lora": ["model.lora.rank=16"],
    "padded": ["data.packing=false"],
    "checkpointing": ["training.activation_checkpointing=true"],
}
SHORT = [
    "training.max_steps=2",
    "data.max_validation_records=4",
    "evaluation.generate=2",
    "evaluation.before=false",
]
PLAN = """
import sys
from pathlib import Path
from finetune.config import load_config
from finetune.display import Display
from finetune.recipes.plan.planner import Planner
plan = Planner(load_config(Path(sys.argv[1]), sys.argv[2:]), Display(enabled=False)).plan()
import json
print(json.dumps({"peak": plan.memory.peak, "phases": plan.memory.phases}))
"""


def peak_of_run(path: str, overrides: list[str]) -> int:
    """Return the most memory that the run has resident at once, in bytes."""
    command = [sys.executable, "-m", "finetune", "train", path, *overrides]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise SystemExit(log.read().decode())
    return usage.ru_maxrss * 1024


def plan_of(path: str, overrides: list[str]) -> dict:
    """Return the planned peak and the phases, in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", PLAN, path, *overrides], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default="translation,chat")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--precision", default="fp32")
    arguments = parser.parse_args()
    print(f"{'task':12} {'mode':14} {'run GB':>7} {'plan GB':>8} {'plan/run':>9}  phase")
    for task in arguments.tasks.split(","):
        path = str(files("finetune.resources") / f"demo_{task}.yaml")
        for mode in arguments.modes.split(","):
            with tempfile.TemporaryDirectory() as folder:
                overrides = [
                    *SHORT,
                    *MODES[mode],
                    f"output_dir={json.dumps(str(Path(folder) / 'run'))}",
                    f"training.precision={arguments.precision}",
                ]
                run, plan = peak_of_run(path, overrides), plan_of(path, overrides)
            phase = max(plan["phases"], key=plan["phases"].__getitem__)
            print(
                f"{task:12} {mode:14} {run / 1e9:7.2f} {plan['peak'] / 1e9:8.2f} "
                f"{plan['peak'] / run:9.3f}  {phase}",
                flush=True,
            )


if __name__ == "__main__":
    main()
