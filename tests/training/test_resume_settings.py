"""What a resumed run says of settings that changed, and what it refuses."""

import json
import shutil

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from finetune.config.loading import make_config
from finetune.display import Display
from finetune.errors import UserError
from finetune.recipes.train.train import run_training


class Said(Display):
    """A display that keeps every line."""

    def __init__(self):
        super().__init__(enabled=False)
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def train(tree, **options):
    display = Said()
    run_training(make_config(tree), display=display, **options)
    return "\n".join(display.lines)


def test_what_moves_the_place_in_the_data_is_refused_and_the_setting_named(tiny):
    train(tiny(training={"max_steps": 1}))
    with pytest.raises(UserError, match=r"data.packing changed \(then True, now False\)"):
        train(tiny(data={"packing": False}), resume="auto")
    with pytest.raises(UserError, match=r"data.max_length changed \(then 96, now 64\)"):
        train(tiny(data={"max_length": 64}), resume="auto")
    with pytest.raises(
        UserError, match=r"the training data changed \(data.targets assistant -> all\)"
    ):
        train(tiny(data={"targets": "all"}), resume="auto")


def test_a_hash_is_short_if_no_setting_explains_the_change(tiny, chat_file):
    train(tiny(training={"max_steps": 1}))
    lines = chat_file.read_text().splitlines()
    chat_file.write_text("\n".join(lines[:40] + lines[41:] + [lines[40]]) + "\n")
    with pytest.raises(UserError, match=r"changed \(then \w{8}, now \w{8}\)"):
        train(tiny(), resume="auto")


def test_a_longer_run_goes_on_with_the_schedule_of_its_new_length(tiny):
    train(tiny(training={"max_steps": 2}))
    said = train(tiny(training={"max_steps": 4}), resume="auto")
    assert "training.max_steps 2 -> 4" in said
    assert "the learning rate is now that of the whole schedule over 4 steps" in said
    assert "finished" not in said


@pytest.mark.parametrize(
    ("length", "why"),
    [
        ({"max_steps": 2}, "all 2 steps are taken"),
        ({"max_steps": 100_000, "max_time": "2s"}, "its time is used"),
    ],
)
def test_a_finished_run_says_so(tiny, tmp_path, length, why):
    train(tiny(training=length))
    record = tmp_path / "run" / "environment.json"
    much = {**json.loads(record.read_text()), "peak_memory_gib": 1000.0}
    record.write_text(json.dumps(much))
    said = train(tiny(training=length), resume="auto")
    assert f"the run is finished, and nothing is trained: {why}" in said
    assert json.loads(record.read_text())["peak_memory_gib"] == 1000.0  # training took it


@pytest.mark.parametrize(("asked", "said"), [(100, True), (6, False)])
def test_a_warm_up_that_is_longer_than_the_run_is_said(tiny, asked, said):
    lines = train(tiny(scheduler={"warmup_steps": asked}))
    assert ("the warm-up of 100 steps (scheduler.warmup_steps) is longer" in lines) == said


def test_tensorboard_has_each_step_once_after_a_resume(tiny, tmp_path):
    tree = {
        **tiny(training={"max_steps": 4}, checkpoint={"every": 1, "keep": 4}),
        "tracking": ["tensorboard"],
    }
    train(tree)
    train(tree, resume=str(tmp_path / "run" / "checkpoints" / "step-00000002"))
    folder = next((tmp_path / "run").rglob("events.out.tfevents.*")).parent
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("before", "after", "lacks"),
    [
        ({"name": "adamw"}, {"amsgrad": True}, "amsgrad .* has no max_exp_avg_sq"),
        ({"name": "rmsprop"}, {"momentum": 0.9}, "momentum .* has no momentum_buffer"),
        ({"name": "rmsprop"}, {"centered": True}, "centered .* has no grad_avg"),
        ({"name": "adamw"}, {"maximize": True, "weight_decay": 0.5}, None),
        ({"name": "adamw", "amsgrad": True}, {"amsgrad": False}, None),
    ],
)
def test_an_option_that_needs_what_the_checkpoint_lacks_is_refused(tiny, before, after, lacks):
    train(tiny(optimizer=before, training={"max_steps": 1}))
    longer = tiny(optimizer=before | after, training={"max_steps": 2})
    if lacks is None:
        assert "optimizer." in train(longer, resume="auto")
    else:
        with pytest.raises(UserError, match=lacks):
            train(longer, resume="auto")


def test_a_finished_run_keeps_the_settings_that_it_was_trained_with(tiny, tmp_path):
    train(tiny(training={"max_steps": 1}))
    before = (tmp_path / "run" / "config.yaml").read_text()
    said = train(tiny(training={"max_steps": 1}, optimizer={"lr": 1.0}), resume="auto")
    assert "nothing is trained" in said
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_a_best_value_of_other_held_out_data_is_not_compared(tiny, tmp_path, chat_file):
    """The best of easy held-out data would stay the best for ever."""
    easy, hard = tmp_path / "easy.jsonl", tmp_path / "hard.jsonl"
    lines = chat_file.read_text().splitlines(keepends=True)
    easy.write_text("".join(lines[:3]))
    odd = [{"role": "user", "content": "zq"}, {"role": "assistant", "content": "xj " * 20}]
    hard.write_text(json.dumps({"messages": odd}) + "\n")
    evaluation = {"every": 1}
    train(tiny(data={"validation": str(easy)}, evaluation=evaluation, training={"max_steps": 3}))
    longer = {"evaluation": evaluation, "training": {"max_steps": 6}}
    again = tiny(data={"validation": str(easy)}, **longer)
    shutil.copytree(tmp_path / "run", tmp_path / "same")
    assert "is not counted" not in train(
        {**again, "output_dir": str(tmp_path / "same")}, resume="auto"
    )
    said = train(tiny(data={"validation": str(hard)}, **longer), resume="auto")
    assert "was by another measure or on other data, and is not counted" in said
    best = json.loads((tmp_path / "run" / "evaluation.json").read_text())["best"]
    assert best["step"] > 3


@pytest.mark.parametrize(
    ("changes", "compares"),
    [
        ({"generation": {"batch_size": 2}}, True),
        ({"generation": {"max_new_tokens": 8}}, False),
        ({"evaluation": {"generate": 3}}, False),
    ],
)
def test_a_best_value_of_other_answers_is_not_compared(tiny, changes, compares):
    """chrF over more prompts, or over longer answers, is another figure."""
    answers = {"every": 1, "best": "chrf", "metrics": ["chrf"], "generate": 2}
    sections = {"evaluation": answers, "training": {"max_steps": 2}}
    train(tiny(**sections))
    longer = {**sections, "training": {"max_steps": 3}}
    longer |= {name: {**longer.get(name, {}), **section} for name, section in changes.items()}
    said = train(tiny(**longer), resume="auto")
    assert ("was by another measure or on other data, and is not counted" in said) != compares
