"""What is tried with one architecture, by `check_architectures.py`, and compared with its oracle.

The oracle is transformers' own model, one example at a time, without padding, packing and cache.
"""

import contextlib
import io
import json
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from finetune.config.loading import make_config
from finetune.display import Display
from finetune.errors import UserError
from finetune.inference.generation import GenerationSettings, generate
from finetune.models.tokenizers import train_tokenizer
from finetune.recipes.build.material import read_material
from finetune.recipes.build.target import open_target
from finetune.recipes.plan.planner import Planner
from finetune.recipes.train.train import run_training

LR, NEW_TOKENS = 0.002, 8
WORDS = [
    "red",
    "blue",
    "green",
    "small",
    "large",
    "cat",
    "dog",
    "bird",
    "house",
    "tree",
    "runs",
    "sleeps",
    "eats",
    "sees",
    "near",
    "far",
]


@dataclass
class Outcome:
    """What became of one architecture."""

    name: str
    result: str = "right"
    note: str = ""  # the refusal, the error, or what is wrong
    chosen: list[str] = field(default_factory=list)  # what the toolkit chose by itself, and said
    lora: str = ""
    plan: str = ""


class Wrong(Exception):
    """A result that is not the oracle's."""


def conversation(number: int, turns: int) -> dict[str, Any]:
    """Return a conversation whose words follow from its number."""
    messages = []
    for turn in range(turns):
        text = " ".join(WORDS[(number * 7 + turn * 5 + k * k) % 16] for k in range(3 + number % 5))
        messages += [
            {"role": "user", "content": f"Repeat: {text}"},
            {"role": "assistant", "content": text},
        ]
    return {"messages": messages}


def write_inputs(folder: Path) -> Any:
    """Write the data, and return a tokenizer trained on it."""
    for name, numbers in (("train", range(12)), ("held", range(20, 24))):
        lines = [json.dumps(conversation(n, 1 + n % 2)) for n in numbers]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    texts = [m["content"] for n in range(12) for m in conversation(n, 2)["messages"]]
    return train_tokenizer(texts, 300)


def tree_of(folder: Path, model: Path, output: Path, **sections: Any) -> dict[str, Any]:
    """Return the config of a run whose single step of an epoch takes all training data."""
    tree: dict[str, Any] = {
        "output_dir": str(output),
        "model": {"name": str(model)},
        "data": {
            "train": str(folder / "train.jsonl"),
            "validation": str(folder / "held.jsonl"),
            "max_length": 96,
        },
        "vocabulary": {"mode": "full"},
        "optimizer": {"name": "sgd", "lr": LR, "weight_decay": 0.0},
        "scheduler": {"name": "constant", "warmup_ratio": 0.0},
        "training": {
            "max_steps": 2,
            "batch_size": 12,
            "micro_batch_size": 5,
            "precision": "fp32",
            "max_grad_norm": 0,
            "divergence_threshold": 1e9,
        },
        "evaluation": {"samples": 2, "every": 1, "batch_size": 3},
        "checkpoint": {"every": 1, "keep": 3, "save_best_model": False},
        "generation": {"max_new_tokens": NEW_TOKENS},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return tree


def plain(folder: Path) -> Any:
    """Return transformers' own model."""
    with torch.random.fork_rng():
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()


def summed_loss(model: Any, dataset: Any) -> tuple[torch.Tensor, int]:
    """Return the nats of all target tokens, one example at a time, and the number of tokens."""
    total, count = torch.zeros(()), 0
    for example in (dataset[i] for i in range(len(dataset))):
        ids, labels = (torch.tensor(list(x)) for x in (example.input_ids, example.labels))
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        total = total + F.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100)
        count += int((labels[1:] != -100).sum())
    return total, count


@torch.no_grad()
def mean_loss(model: Any, dataset: Any) -> float:
    total, count = summed_loss(model, dataset)
    return float(total) / count


def take_plain_step(model: Any, dataset: Any) -> tuple[float, float]:
    """Take a step of gradient descent; return the loss and the gradient's norm before it."""
    total, count = summed_loss(model, dataset)
    (total / count).backward()
    gradients = {id(p): p for p in model.parameters() if p.grad is not None and p.requires_grad}
    norm = torch.stack([p.grad.norm() for p in gradients.values()]).norm()
    with torch.no_grad():
        for parameter in gradients.values():
            parameter.sub_(parameter.grad, alpha=LR)
            parameter.grad = None
    return float(total) / count, float(norm)


@torch.no_grad()
def check_answers(
    model: Any, prompts: Sequence[Sequence[int]], answers: Any, stops: set[int]
) -> None:
    """Raise Wrong unless each answer is greedy for `model` without a cache, but for near ties."""
    for prompt, answer in zip(prompts, answers, strict=True):
        for place in range(NEW_TOKENS):
            ids = torch.tensor([[*prompt, *answer[:place]]])
            logits = model(input_ids=ids, use_cache=False).logits[0, -1]
            ended = place == len(answer)
            given = (
                min(stops, key=lambda i: -float(logits[i]))
                if ended and stops
                else (-1 if ended else answer[place])
            )
            gap = float(logits.max() - logits[given]) if given >= 0 else float("inf")
            if gap > 1e-3 * float(logits.abs().max()):
                raise Wrong(f"answer {list(answer)} is not greedy at place {place} (gap {gap:.2g})")
            if ended:
                break


def same(what: str, ours: float, theirs: float, tolerance: float = 2e-4) -> None:
    if not abs(ours - theirs) <= tolerance * max(abs(theirs), 1e-3):
        raise Wrong(f"{what}: {ours:.6g}, transformers' own {theirs:.6g}")


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def train(tree: dict[str, Any], **options: Any) -> tuple[Any, list[str]]:
    """Train, and return the config and the notes."""
    config, display = make_config(tree), Display(enabled=False)
    run_training(config, display=display, **options)
    return config, display.notes


def try_training(folder: Path, model: Path, run: Path) -> list[str]:
    """Train two steps, and compare with plain steps; return the notes."""
    config, notes = train(tree_of(folder, model, run))
    material = read_material(config, Display(enabled=False))
    oracle, held = plain(model), material.validation
    lines = records(run)
    steps = [line for line in lines if "lr" in line]
    evaluations = {line["step"]: line for line in lines if "lr" not in line}
    value = {
        step: line.get("metrics", line.get("evaluation", line))
        for step, line in evaluations.items()
    }
    same("held-out loss before", value[0]["loss"], mean_loss(oracle, held))
    check_samples(oracle, run, material)
    for step in steps:
        loss, norm = take_plain_step(oracle, material.train)
        same(f"loss of step {step['step']}", step["loss"], loss)
        same(f"gradient norm of step {step['step']}", step["grad_norm"], norm, 2e-3)
    same("held-out loss after", value[2]["loss"], mean_loss(oracle, held))
    same("held-out loss of model/", mean_loss(plain(run / "model"), held), mean_loss(oracle, held))
    return notes


def check_samples(oracle: Any, run: Path, material: Any) -> None:
    """Compare the answers before training with the oracle's."""
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    samples = [sample for sample in samples if sample["step"] == 0]
    if len(samples) != 2:
        raise Wrong(f"{len(samples)} samples instead of 2")
    stop = material.tokenizer.eos_token_id
    for sample, (_, record) in zip(samples, material.raw.validation):
        prompt = list(material.format.prompts(record)[0].input_ids)
        with torch.no_grad():
            ids = list(prompt)
            for _ in range(NEW_TOKENS):
                logits = oracle(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
                top = logits.topk(2)
                if float(top.values[0] - top.values[1]) < 1e-3 * float(logits.abs().max()):
                    return  # a near tie: `check_answers` looks at the tokens
                if int(logits.argmax()) == stop:
                    break
                ids.append(int(logits.argmax()))
        text = material.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
        if text.strip() != sample["output"].strip():
            raise Wrong(f"the sample is {sample['output']!r}, transformers' own {text!r}")


def try_resume(folder: Path, model: Path, run: Path) -> None:
    """Resume after the first step in another folder: the same model to the bit."""
    other = run.with_name("resumed")
    train(tree_of(folder, model, other), resume=str(run / "checkpoints" / "step-00000001"))
    ours, theirs = plain(run / "model").state_dict(), plain(other / "model").state_dict()
    for name, tensor in ours.items():
        if not torch.equal(tensor, theirs[name]):
            raise Wrong(f"resumed, {name} is another")


def try_generation(run: Path) -> None:
    """Answer prompts with and without a shared start, as `finetune generate` does."""
    oracle = plain(run / "model")
    with contextlib.redirect_stderr(io.StringIO()):
        opened = open_target(str(run))
    start = [9, 14, 23, 7, 31, 18]
    for prompts in (
        [[*start, 40, 41], [*start, *range(20, 34)], [*start, 55, 60, 71, 20, 33]],
        [[11, 12, 13], list(range(30, 50)), [77, 78, 79, 80, 12, 14, 15]],
    ):
        for stops in (set(), {opened.tokenizer.eos_token_id}):
            settings = GenerationSettings.greedy(NEW_TOKENS, sorted(stops))
            answers = generate(opened.model, prompts, batch_size=3, settings=settings)
            check_answers(oracle, prompts, answers, stops)


def try_lora(folder: Path, model: Path, run: Path) -> str:
    """Train with LoRA: model/ has the loss that was measured. Return the result."""
    other = run.with_name("lora")
    tree = tree_of(folder, model, other, evaluation={"samples": 0, "every": 2})
    tree["model"]["lora"] = {"rank": 4, "alpha": 16}
    tree["optimizer"] = {"name": "adamw", "lr": 0.01}
    try:
        config, _ = train(tree)
    except UserError as error:
        return refusal(other, error)
    held = read_material(config, Display(enabled=False)).validation
    after = json.loads((other / "evaluation.json").read_text())["after"]
    loss = after.get("metrics", after)["loss"]
    same("with LoRA, held-out loss of model/", mean_loss(plain(other / "model"), held), loss)
    if loss == json.loads((other / "evaluation.json").read_text())["before"].get("loss"):
        raise Wrong("with LoRA, nothing was learnt")
    return "right"


def try_plan(folder: Path, model: Path, run: Path) -> str:
    """Plan the run: the parameters are those of the model. Return the result."""
    tree = tree_of(folder, model, run.with_name("planned"))
    try:
        plan = Planner(make_config(tree), Display(enabled=False)).plan()
    except UserError as error:
        return f"refused: {error}"
    count = sum(parameter.numel() for parameter in plain(model).parameters())
    if plan.model["parameters"] != count:
        raise Wrong(f"the plan has {plan.model['parameters']:,} parameters instead of {count:,}")
    return "right"


def refusal(run: Path, error: UserError) -> str:
    """Return the sentence of a refusal. Raises Wrong if it came after the first step."""
    metrics = run / "metrics.jsonl"
    if metrics.is_file() and metrics.read_text().strip():
        raise Wrong(f"refused after the start: {error}") from error
    if "\n" in str(error):
        raise Wrong(f"refused in several lines: {error}") from error
    return f"refused: {error}"


def check(name: str, folder: Path, tokenizer: Any) -> Outcome:
    """Try one architecture."""
    outcome, model, run = Outcome(name), folder / "base", folder / "run"
    try:
        made = tiny_model(name, len(tokenizer))
        with torch.no_grad():
            if not made(input_ids=torch.arange(24)[None] + 5).logits.isfinite().all():
                raise ValueError("its random weights give no numbers")
        made.save_pretrained(model)
        tokenizer.save_pretrained(model)
        plain(model)
    except Exception as error:
        return Outcome(
            name, "not built", " ".join(f"{type(error).__name__}: {error}".split())[:200]
        )
    try:
        try:
            outcome.chosen = try_training(folder, model, run)
        except UserError as error:
            outcome.result, outcome.note = "refused", refusal(run, error).removeprefix("refused: ")
            return outcome
        try_resume(folder, model, run)
        try_generation(run)
        outcome.lora = try_lora(folder, model, run)
        outcome.plan = try_plan(folder, model, run)
    except Wrong as error:
        outcome.result, outcome.note = "wrong", str(error)[:300]
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        outcome.result = "traceback"
        outcome.note = (
            f"{type(error).__name__}: {error}".replace("\n", " ")[:200]
            + f" ({Path(place.filename).name}:{place.lineno})"
        )
        outcome.chosen.append(traceback.format_exc())
    return outcome
