"""Try every decoder of transformers: train, resume, evaluate, generate, export, plan, LoRA.

Each architecture gets a tiny random model with weights large enough for the context to matter. The
oracle is transformers' own model, one example at a time, without padding, packing and cache.

    python scripts/check_architectures.py --only lfm2,mpt          # some of them
    python scripts/check_architectures.py --json outcomes.jsonl    # all, about 25 minutes
    python scripts/check_architectures.py --page outcomes.jsonl    # writes docs/architectures.md

An architecture is right, or refused in a sentence before the first step. Anything else is a bug.
"""

# ruff: noqa: E402
import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import transformers
from architecture_trials import Outcome, check, write_inputs
from tiny_models import decoders

SECONDS = 240  # for one architecture
CHOICES = {
    "packing is off": "no packing",
    "attention is eager": "eager attention",
    "only prompts of one length": "only prompts of one length are answered together",
    "answered one by one": "prompts are answered one by one",
}
RESULTS = ("right", "refused", "traceback", "wrong", "not built")


def page_of(outcomes: Sequence[Outcome]) -> str:
    """Return docs/architectures.md. The last outcome of an architecture counts."""
    last = {outcome.name: outcome for outcome in outcomes}
    lines = [
        "# Architectures",
        "",
        f"Every decoder of transformers {transformers.__version__}, as a tiny random model: two "
        "training steps, a resume, evaluations, answers to several prompts, the export read again, "
        "the plan, and LoRA. The oracle is transformers' own model, one example at a time. "
        "`scripts/check_architectures.py` makes this page.",
        "",
        "| Result | Architectures |",
        "|---|---:|",
        *(f"| {r} | {sum(o.result == r for o in last.values())} |" for r in RESULTS),
        "",
        "Right:",
        "",
        ", ".join(sorted(o.name for o in last.values() if o.result == "right")) + ".",
        "",
        "What the toolkit chose by itself, and said:",
        "",
        "| Choice | Architectures |",
        "|---|---|",
    ]
    for text, choice in CHOICES.items():
        names = [o.name for o in last.values() if any(text in note for note in o.chosen)]
        lines.append(f"| {choice} | {', '.join(sorted(names))} |")
    lines += ["", "The others:", "", "| Architecture | Result | Reason |", "|---|---|---|"]
    for outcome in sorted(last.values(), key=lambda o: (RESULTS.index(o.result), o.name)):
        reasons = [
            outcome.note,
            outcome.lora.removeprefix("right"),
            outcome.plan.removeprefix("right"),
        ]
        if reason := "; ".join(filter(None, reasons)):
            part = "" if outcome.result != "right" else ", but for LoRA or the plan"
            lines.append(
                f"| {outcome.name} | {outcome.result}{part} | {reason.replace('|', '/')} |"
            )
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def quiet_workplace() -> Iterator[Path]:
    """Yield a folder that is removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="architectures-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def stop_late(signum: int, frame: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names, joined by commas")
    parser.add_argument("--verbose", action="store_true", help="print notes and tracebacks")
    parser.add_argument("--json", type=Path, help="append each outcome to this file")
    parser.add_argument("--page", type=Path, help="write the page from this file, and do no more")
    arguments = parser.parse_args()
    if arguments.page:
        lines = arguments.page.read_text().splitlines()
        page = page_of([Outcome(**json.loads(line)) for line in lines])
        (Path(__file__).parents[1] / "docs" / "architectures.md").write_text(page)
        return
    transformers.logging.set_verbosity_error()
    names = arguments.only.split(",") if arguments.only else decoders()
    signal.signal(signal.SIGALRM, stop_late)
    outcomes = []
    for name in names:
        with quiet_workplace() as folder:
            tokenizer = write_inputs(folder)
            signal.alarm(SECONDS)
            with contextlib.redirect_stdout(io.StringIO()):
                outcome = check(name, folder, tokenizer)
            signal.alarm(0)
        outcomes.append(outcome)
        print(f"{name}: {outcome.result} {outcome.note}", file=sys.stderr)
        if arguments.verbose:
            print(*outcome.chosen, sep="\n", file=sys.stderr)
        if arguments.json:
            with arguments.json.open("a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
    for result in RESULTS:
        print(result, sum(outcome.result == result for outcome in outcomes))


if __name__ == "__main__":
    main()
