"""Where a generated token's time goes: our decoding of one prompt and of many, and transformers'.

    python scripts/profile_decoding.py TARGET [--prompts 1,64] [--tokens 48] [--temperature 0]

TARGET is a run or a model. The prompts have 24 to 56 tokens that are drawn at random. Seconds are
per step, which gives a token to each prompt: the median over the rounds, in which ours and
transformers' `generate` take their turn. `floor` is the time to read all weights once, at the
bandwidth of a copy on this machine. Prints a table, then one JSON line.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from bench_optimizer import copy_bandwidth

from finetune.inference.batching import way_of
from finetune.inference.decoder import Decoder, GenerationSettings
from finetune.models.describe import inner_model, tensor_bytes
from finetune.models.language_model import evaluating
from finetune.recipes.build.target import open_target

ROUNDS = 3
PARTS = ("attention", "MLP", "head", "choice of tokens", "everything else")


class Clock:
    """Seconds by part. A part inside another one counts for itself alone."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._open: list[tuple[str, float]] = []

    def start(self, part: str, *_: Any) -> None:
        self._stop_counting()
        self._open.append((part, time.perf_counter()))

    def stop(self, *_: Any) -> None:
        self._stop_counting()
        self._open.pop()
        if self._open:
            self._open[-1] = (self._open[-1][0], time.perf_counter())

    def _stop_counting(self) -> None:
        if self._open:
            part, since = self._open[-1]
            self.seconds[part] += time.perf_counter() - since


def part_of(module: Any, head: Any) -> str | None:
    """Return the part of a step that a module is, by its class."""
    if module is head:
        return "head"
    kind = type(module).__name__
    return "attention" if kind.endswith("Attention") else "MLP" if kind.endswith("MLP") else None


@contextmanager
def watched(model: Any, clock: Clock) -> Iterator[None]:
    """Give the time in the model's modules to their parts."""
    hooks = []
    for module in model.modules():
        if (part := part_of(module, model.get_output_embeddings())) is not None:
            hooks.append(module.register_forward_pre_hook(partial(clock.start, part)))
            hooks.append(module.register_forward_hook(clock.stop))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def decode(
    model: Any, prompts: Sequence[Sequence[int]], settings: GenerationSettings, clock: Clock | None
) -> float:
    """Return the seconds of a step of ours, after the first, which reads the prompts."""
    numbered = dict(enumerate(prompts))
    decoder = Decoder(model, numbered, dict.fromkeys(numbered, settings), way_of(model))
    if clock is not None:
        choose = decoder._choose

        def timed(logits: Any) -> Any:
            clock.start("choice of tokens")
            try:
                return choose(logits)
            finally:
                clock.stop()

        decoder._choose = timed  # type: ignore[method-assign]
    decoder.step()
    if clock is not None:
        clock.seconds = dict.fromkeys(PARTS, 0.0)
        clock.start("everything else")
    started, steps = time.perf_counter(), 0
    while decoder.active:
        decoder.step()
        steps += 1
    seconds = time.perf_counter() - started
    if clock is not None:
        clock.stop()
        clock.seconds = {part: each / steps for part, each in clock.seconds.items()}
    return seconds / steps


@torch.inference_mode()
def decode_theirs(model: Any, prompts: Sequence[Sequence[int]], settings: Any) -> float:
    """Return the seconds of a step of transformers' `generate`, without reading the prompts."""
    width, taken = max(map(len, prompts)), []
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    sampled = {"temperature": settings.temperature, "top_p": 1.0, "top_k": 0}
    options = {"do_sample": True, **sampled} if settings.temperature else {"do_sample": False}
    for count in (1, settings.max_new_tokens):
        started = time.perf_counter()
        model.generate(
            input_ids=ids, attention_mask=mask, min_new_tokens=count, max_new_tokens=count,
            pad_token_id=0, **options,
        )  # fmt: skip
        taken.append(time.perf_counter() - started)
    return (taken[1] - taken[0]) / (settings.max_new_tokens - 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target")
    parser.add_argument("--prompts", default="1,64", help="how many at once, separated by commas")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model: Any = inner_model(open_target(args.target).model)
    settings = GenerationSettings(
        max_new_tokens=args.tokens, temperature=args.temperature, top_p=1.0, top_k=0,
        repetition_penalty=1.0, stop_ids=(), seed=0,
    )  # fmt: skip
    torch.manual_seed(0)
    floor = tensor_bytes(model.parameters()) / copy_bandwidth()
    rows: dict[str, Any] = {}
    with evaluating(model):
        for count in map(int, args.prompts.split(",")):
            lengths = torch.randint(24, 57, (count,)).tolist()
            rows_of_table = model.get_input_embeddings().num_embeddings
            prompts = [torch.randint(5, rows_of_table, (n,)).tolist() for n in lengths]
            ours, theirs, clock = [], [], Clock()
            for _ in range(ROUNDS):
                ours.append(decode(model, prompts, settings, None))
                theirs.append(decode_theirs(model, prompts, settings))
            with watched(model, clock):
                decode(model, prompts, settings, clock)
            rows[str(count)] = {
                "ours": statistics.median(ours), "transformers": statistics.median(theirs),
                "parts": clock.seconds,
            }  # fmt: skip
    print(f"{'prompts':>7} {'ours':>9} {'generate':>9} {'floor':>9}   of ours, in ms")
    for name, row in rows.items():
        parts = ", ".join(f"{part} {1e3 * each:.1f}" for part, each in row["parts"].items())
        print(
            f"{name:>7} {1e3 * row['ours']:6.1f} ms {1e3 * row['transformers']:6.1f} ms "
            f"{1e3 * floor:6.1f} ms   {parts}"
        )
    print(json.dumps({"target": args.target, "floor": floor, "prompts": rows}))


if __name__ == "__main__":
    main()
