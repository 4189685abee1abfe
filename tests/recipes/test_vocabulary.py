"""Runs with an active vocabulary, from the config to the exported model."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from finetune.config import load_config
from finetune.display import Display
from finetune.errors import UserError
from finetune.models.tokenizers import byte_tokens, template_tokens
from finetune.recipes.build.look import look_at
from finetune.recipes.build.vocabulary import plan_vocabulary, spare_rows
from finetune.recipes.evaluate import evaluate_target
from finetune.recipes.export.export import export_target
from finetune.recipes.inspect import inspect_data
from finetune.recipes.plan.plan import plan_run
from finetune.recipes.plan.planner import Planner
from finetune.recipes.plan.tables import make_console, print_plan
from finetune.recipes.train.train import run_training

WORDS = [
    "the", "a", "cat", "dog", "sat", "ran", "on", "in", "mat", "log", "big", "red", "and", "then",
    "it", "was",
]  # fmt: skip
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
NEOX = {
    "model_type": "gpt_neox",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}  # not tied


def write_texts(path: Path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def sentences(count, seed=0, words=WORDS):
    generator = torch.Generator().manual_seed(seed)
    return [
        " ".join(words[i] for i in torch.randint(0, len(words), (12,), generator=generator))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A trained tiny model with a larger vocabulary than the data of these tests uses."""
    folder = tmp_path_factory.mktemp("base")
    wide = [*WORDS, *(f"{a}{b}{c}" for a in "bdgklm" for b in "aeiou" for c in "nprst")]
    data = write_texts(folder / "wide.jsonl", sentences(600, words=wide))
    config = write_config(
        folder / "base.yaml",
        model={"config": LLAMA, "tokenizer": {"vocab_size": 400}},
        data={"train": data, "max_length": 64},
        optimizer={"name": "adamw", "lr": 3e-3},
        training={"max_steps": 20},
        vocabulary={"mode": "full"},
    )
    run_training(load_config(config))
    return folder / "run" / "model"


def write_config(path, **sections):
    """Write a config that keeps no samples and whose run is run/ in the same folder."""
    tree = {"output_dir": str(path.parent / "run"), "evaluation": {"samples": 0}, **sections}
    path.write_text(yaml.safe_dump(tree))
    return path


def config_for(base, folder, *overrides):
    path = write_config(
        folder / "run.yaml",
        model={"name": str(base)},
        data={
            "train": write_texts(folder / "train.jsonl", sentences(200, seed=1)),
            "validation": write_texts(folder / "held_out.jsonl", sentences(30, seed=2)),
            "max_length": 64,
        },
        optimizer={"name": "adamw", "lr": 2e-3},
        scheduler={"name": "constant"},
        training={"max_steps": 8, "batch_size": 4, "micro_batch_size": 2, "precision": "fp32"},
    )
    return load_config(path, list(overrides))


def evaluations(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["evaluation"] for record in records if "evaluation" in record]


def losses(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "evaluation" not in record}


def table(folder):
    return load_file(folder / "model.safetensors")["model.embed_tokens.weight"]


def test_auto_trains_the_rows_in_use_and_exports_the_others_bit_for_bit(base, tmp_path, capsys):
    unrelated = write_texts(
        tmp_path / "other.jsonl", sentences(20, words=["ban", "dep", "gir", "kos", "lut", "men"])
    )
    run_training(config_for(base, tmp_path, f"data.unrelated={unrelated}", "training.max_steps=40"))
    run = tmp_path / "run"
    line = next(
        note
        for note in json.loads((run / "environment.json").read_text())["notes"]
        if note.startswith("vocabulary")
    )
    assert line.startswith("vocabulary: active (the table is tied")
    shown = capsys.readouterr().err
    assert line in " ".join(shown.split())
    assert line in (run / "report.html").read_text()
    before, after = table(base), table(run / "model")
    moved = (before != after).any(1)
    used = {
        i
        for text in sentences(200, seed=1)
        for i in AutoTokenizer.from_pretrained(base)(text).input_ids
    }
    assert used <= set(moved.nonzero()[:, 0].tolist())
    assert 0.4 < moved.float().mean() < 0.9
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    first, *_, last = evaluations(run)
    assert last["loss"] < first["loss"]
    assert last["loss_inside"] == pytest.approx(last["loss"])
    assert "loss_outside" not in last
    assert last["share_outside"] == 0
    assert 0 < last["inactive_mass"] < first["inactive_mass"] < 1
    assert last["unrelated_loss"] != first["unrelated_loss"]
    ending = f"unrelated loss {last['unrelated_loss']:.3f}"
    assert [ending in text for text in shown.splitlines() if "held-out after:" in text] == [True]
    page, card = (run / "report.html").read_text(), (run / "model" / "README.md").read_text()
    masses = [f"<td>{100 * part['inactive_mass']:.2f}</td>" for part in (first, last)]
    assert "".join(masses) in page
    assert (
        "| Inactive targets, % | Inactive mass, % | Inactive mass, %, p99 | Unrelated loss |"
        in card
    )
    assert "| step 40, this model |" in card
    assert f"- {line}\n" in card


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_finished_run_reads_as_it_read_itself(base, tmp_path, precision):
    unrelated = write_texts(tmp_path / "other.jsonl", sentences(20, words=["ban", "dep", "gir"]))
    run_training(
        config_for(base, tmp_path, f"training.precision={precision}", f"data.unrelated={unrelated}")
    )
    found, after = (
        evaluate_target(str(tmp_path / "run"), config=None, overrides=()),
        evaluations(tmp_path / "run")[-1],
    )
    assert found["precision"] == precision
    for key in ("loss", "inactive_mass", "inactive_mass_p99", "unrelated_loss"):
        assert found[key] == pytest.approx(after[key], rel=1e-6), key


def test_active_equals_full_but_for_the_frozen_rows(base, tmp_path):
    found = {}
    for mode in ("full", "active"):
        (tmp_path / mode).mkdir()
        run_training(
            config_for(
                base,
                tmp_path / mode,
                f"vocabulary.mode={mode}",
                "optimizer.name=sgd",
                "training.max_grad_norm=0",
            )
        )
        found[mode] = losses(tmp_path / mode / "run")
    assert found["full"].keys() == found["active"].keys()
    assert found["full"][1] == pytest.approx(found["active"][1], abs=1e-5)
    assert found["full"][8] == pytest.approx(found["active"][8], abs=5e-3)
    assert found["full"][8] != found["active"][8]


def test_every_mode_reports_the_mass_on_the_same_tokens(base, tmp_path):
    first = {}
    for mode in ("full", "active", "frozen"):
        (tmp_path / mode).mkdir()
        run_training(
            config_for(base, tmp_path / mode, f"vocabulary.mode={mode}", "training.max_steps=2")
        )
        before, after = evaluations(tmp_path / mode / "run")
        assert after["inactive_mass"] != before["inactive_mass"]
        first[mode] = before["inactive_mass"]
    assert 0.01 < first["full"] < 1
    assert (
        first["full"]
        == pytest.approx(first["active"], rel=1e-4)
        == pytest.approx(first["frozen"], rel=1e-4)
    )


@pytest.mark.parametrize("mode", ["active", "full"])
def test_test_data_is_told_apart_by_the_tokens_of_the_run(base, tmp_path, mode):
    new = [
        f"{a} {b}"
        for a, b in zip(
            sentences(20, 5), sentences(20, 6, words=["ban", "dep", "gir", "kos"]), strict=True
        )
    ]
    test, unrelated = (
        write_texts(tmp_path / "test.jsonl", new),
        write_texts(tmp_path / "other.jsonl", new[:3]),
    )
    run_training(
        config_for(
            base,
            tmp_path,
            f"vocabulary.mode={mode}",
            f"data.test={test}",
            f"data.unrelated={unrelated}",
        )
    )
    run = tmp_path / "run"
    found = evaluate_target(str(run), config=None, overrides=[])
    model, tokenizer = (
        kind.from_pretrained(run / "model") for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    used = set(json.loads((run / "vocabulary.json").read_text())["used"])
    assert set(tokenizer(" ".join(sentences(200, seed=1))).input_ids) <= used
    inside, outside, masses = [], [], []
    for text in new:
        ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], 1)
        for row, token in zip(logs, ids[1:], strict=False):
            (inside if token in used else outside).append(-float(row[token]))
            masses.append(1 - float(row.exp()[sorted(used)].sum()))
    assert 0 < len(outside) < len(inside)
    assert found["loss_inside"] == pytest.approx(sum(inside) / len(inside), rel=1e-4)
    assert found["loss_outside"] == pytest.approx(sum(outside) / len(outside), rel=1e-4)
    assert found["share_outside"] == pytest.approx(len(outside) / (len(inside) + len(outside)))
    assert found["inactive_mass"] == pytest.approx(sum(masses) / len(masses), rel=1e-3)
    share = found["share_outside"]
    assert found["loss"] == pytest.approx(
        share * found["loss_outside"] + (1 - share) * found["loss_inside"]
    )
    assert found["unrelated_loss"] == pytest.approx(
        evaluations(run)[-1]["unrelated_loss"], rel=1e-4
    )
    assert (
        json.loads((run / "evaluation.json").read_text())["test"]["loss_outside"]
        == found["loss_outside"]
    )


def test_unrelated_text_is_read_without_held_out_data_too(base, tmp_path, capsys):
    unrelated = write_texts(tmp_path / "other.jsonl", sentences(20, words=["ban", "dep", "gir"]))
    options = [
        f"data.unrelated={unrelated}",
        "data.validation=null",
        "data.validation_fraction=0",
        "training.max_steps=2",
    ]
    run_training(config_for(base, tmp_path, *options))
    first, last = evaluations(tmp_path / "run")
    assert set(last) == {"unrelated_loss", "seconds"}
    assert (
        f"held-out after:  unrelated loss {last['unrelated_loss']:.3f}" in capsys.readouterr().err
    )
    figures = f"from {first['unrelated_loss']:.3f} to {last['unrelated_loss']:.3f}"
    sentence = f"In 2 steps the loss on unrelated text (fell|rose) {figures}"
    assert re.search(sentence, (tmp_path / "run" / "report.html").read_text())


@pytest.mark.parametrize("mode", ["active", "sampled", "frozen"])
def test_a_resumed_run_equals_an_uninterrupted_one(base, tmp_path, mode, monkeypatch):
    # for `sampled`: before the interruption, and after it
    monkeypatch.setattr("finetune.training.vocabulary.MEASURED_AT", {2, 6})
    options = [f"vocabulary.mode={mode}", "vocabulary.num_sampled=40", "checkpoint.every=4"]
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    run_training(config_for(base, tmp_path / "whole", *options))
    config = config_for(base, tmp_path / "cut", *options)
    run_training(
        config.model_copy(update={"training": config.training.model_copy(update={"max_steps": 4})})
    )
    run_training(config, resume="auto")
    assert losses(tmp_path / "cut" / "run") == losses(tmp_path / "whole" / "run")
    assert torch.equal(
        table(tmp_path / "cut" / "run" / "model"), table(tmp_path / "whole" / "run" / "model")
    )
    if mode == "frozen":
        assert torch.equal(table(tmp_path / "whole" / "run" / "model"), table(base))
    export_target(
        tmp_path / "cut" / "run",
        tmp_path / "out",
        dtype="float32",
        checkpoint=config.output_dir / "checkpoints/step-00000008",
    )
    assert torch.equal(table(tmp_path / "out"), table(tmp_path / "cut" / "run" / "model"))


def cut_and_whole(base, folder, *options, prepare=lambda folder: None):
    """Return a run of 8 steps, compared with one that stopped after 4 and was resumed.

    Its checkpoint of step 4 is exported, and compared with the model of the run that stopped.
    """
    for name in ("whole", "cut"):
        (folder / name).mkdir()
        config = config_for(
            base, folder / name, "checkpoint.every=4", "checkpoint.keep=9", *options
        )
        prepare(folder / name)
        if name == "cut":
            run_training(
                config.model_copy(
                    update={"training": config.training.model_copy(update={"max_steps": 4})}
                )
            )
            shutil.copytree(folder / "cut" / "run" / "model", folder / "halfway")
        run_training(config, resume="auto" if name == "cut" else None)
    whole, cut = folder / "whole" / "run", folder / "cut" / "run"
    export_target(
        whole,
        folder / "exported",
        dtype="float32",
        checkpoint=whole / "checkpoints" / "step-00000004",
    )
    assert losses(cut) == losses(whole)
    weights = [load_file(path / "model.safetensors") for path in (cut / "model", whole / "model")]
    assert all(
        torch.equal(weights[0][name], weights[1][name])
        for name in weights[0].keys() | weights[1].keys()
    )
    halfway, exported = (
        load_file(folder / name / "model.safetensors") for name in ("halfway", "exported")
    )
    for name in halfway.keys() | exported.keys():
        torch.testing.assert_close(exported[name], halfway[name], rtol=1e-6, atol=1e-7)
    return whole


def test_lora_with_active_rows_resumes_and_exports_a_checkpoint(base, tmp_path):
    whole = cut_and_whole(base, tmp_path, "vocabulary.mode=active", "model.lora.rank=2")
    moved = (table(whole / "model") != table(base)).any(1)
    assert 0.4 < moved.float().mean() < 0.9


@pytest.mark.parametrize("optimizer", ["adamw", "lazy_adamw"])
def test_an_untied_model_with_a_compact_head_resumes_and_exports_a_checkpoint(
    base, tmp_path, optimizer
):
    torch.manual_seed(0)
    config = AutoConfig.for_model(**NEOX, vocab_size=400, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "untied")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "untied")
    whole = cut_and_whole(
        tmp_path / "untied", tmp_path, "vocabulary.mode=active", f"optimizer.name={optimizer}"
    )
    used = json.loads((whole / "vocabulary.json").read_text())["used"]
    before, after = (
        AutoModelForCausalLM.from_pretrained(path)
        for path in (tmp_path / "untied", whole / "model")
    )
    for read in ("get_input_embeddings", "get_output_embeddings"):
        moved = (
            (getattr(before, read)().weight != getattr(after, read)().weight)
            .any(1)
            .nonzero()[:, 0]
            .tolist()
        )
        assert moved
        assert set(moved) <= set(used)


@pytest.mark.parametrize("mode", ["active", "sampled"])
def test_a_stream_that_has_grown_resumes_as_if_it_had_not_stopped(
    base, tmp_path, monkeypatch, mode
):
    monkeypatch.setattr("finetune.recipes.build.data.STREAM_SAMPLE", 5)

    def prepare(folder):
        write_texts(
            folder / "train.jsonl",
            [*sentences(5, words=["cat", "sat"]), *sentences(200, words=["ban", "dep", "gir"])],
        )

    stream = ["data.streaming=true", "data.shuffle_buffer=16", "evaluation.every=8"]
    options = [f"vocabulary.mode={mode}", "vocabulary.num_sampled=40", *stream]
    whole = cut_and_whole(base, tmp_path, *options, prepare=prepare)
    notes = json.loads((whole / "environment.json").read_text())["notes"]
    assert any("tokens that its first records did not have" in note for note in notes)
    assert notes[0].startswith(f"vocabulary: {mode}")
    ids = AutoTokenizer.from_pretrained(base)("ban dep gir").input_ids
    assert set(ids) <= set(json.loads((whole / "vocabulary.json").read_text())["used"])
    # it had grown before it stopped
    assert (table(base) != table(tmp_path / "halfway")).any(1)[ids].all()
    summary = json.loads((whole / "evaluation.json").read_text())
    counts = [summary[when]["active_tokens"] for when in ("before", "after")]
    assert counts[0] < counts[1]
    assert notes[-1].endswith(f"does not compare: {counts[0]} were active before, {counts[1]} then")
    rows = re.findall(r"<tr>.*?</tr>", (whole / "report.html").read_text(), re.DOTALL)
    row = next(row for row in rows if "Inactive mass, %<" in row.replace(" <", "<"))
    assert not re.search("better|worse", row)


def test_the_sampled_loss_does_not_depend_on_how_a_step_is_cut(base, tmp_path):
    found = []
    for size in (1, 4):
        folder = tmp_path / str(size)
        folder.mkdir()
        options = [
            "vocabulary.mode=sampled",
            "vocabulary.num_sampled=40",
            f"training.micro_batch_size={size}",
        ]
        run_training(config_for(base, folder, *options))
        found.append(list(losses(folder / "run").values()))
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_a_stream_grows_the_active_vocabulary(base, tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.recipes.build.data.STREAM_SAMPLE", 5)
    stream = ["data.streaming=true", "data.shuffle_buffer=16"]
    kept = ["checkpoint.every=4", "checkpoint.keep=9"]
    config = config_for(base, tmp_path, "vocabulary.mode=active", *stream, *kept)
    new = write_texts(
        tmp_path / "train.jsonl",
        [*sentences(5, words=["cat", "sat"]), *sentences(200, words=["ban", "dep", "gir"])],
    )
    assert str(config.data.train[0].path) == new
    run_training(config)
    run = tmp_path / "run"
    notes = [
        note
        for note in json.loads((run / "environment.json").read_text())["notes"]
        if note.startswith("vocabulary: ")
    ]
    chosen, begin, end = notes
    active = int(re.search(r"(\d+) of \d+ rows", chosen)[1])
    assert begin.startswith(
        "vocabulary: the stream has tokens that its first records did not have; they train from "
        "now on (room for "
    )
    now, later = map(int, re.findall(r"\d+", end))
    assert (now - later, end) == (
        active,
        f"vocabulary: {now} tokens train at the end, {later} of which turned up in the stream",
    )
    assert later > 2
    recorded = json.loads((run / "vocabulary.json").read_text())["chosen"]
    assert f"vocabulary: {recorded}" == f"{chosen}; {end.removeprefix('vocabulary: ')}"
    assert recorded in (run / "model" / "README.md").read_text()
    ids = AutoTokenizer.from_pretrained(base)("ban dep gir").input_ids
    assert (table(base) != table(run / "model")).any(1)[ids].all()
    export_target(
        run, tmp_path / "earlier", dtype="float32", checkpoint=run / "checkpoints" / "step-00000004"
    )
    assert not torch.equal(table(tmp_path / "earlier"), table(run / "model"))


def test_a_stream_that_has_more_tokens_than_there_is_room_for_says_so_once(
    base, tmp_path, monkeypatch
):
    monkeypatch.setattr("finetune.recipes.build.data.STREAM_SAMPLE", 5)
    monkeypatch.setattr(
        "finetune.recipes.build.vocabulary.spare_rows", lambda num_active, num_rows: 1
    )
    config = config_for(
        base, tmp_path, "data.streaming=true", "vocabulary.mode=active", "data.shuffle_buffer=16"
    )
    write_texts(
        tmp_path / "train.jsonl",
        [*sentences(5, words=["cat"]), *sentences(200, words=["ban", "dep", "gir"])],
    )
    run_training(config)
    notes = json.loads((tmp_path / "run" / "environment.json").read_text())["notes"]
    assert sum("they train from now on (room for 1)" in note for note in notes) == 1
    assert sum("all 1 spare rows are taken" in note for note in notes) == 1
    used = json.loads((tmp_path / "run" / "vocabulary.json").read_text())["used"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = tokenizer(sentences(200, words=["ban", "dep", "gir"])).input_ids
    late = {i for ids in texts for i in ids} - set(used)
    ending = (
        f"1 of which turned up in the stream; {len(late)} more came (since the last start) "
        "when no row was left"
    )
    assert len(late) > 2
    assert sum(ending in note for note in notes) == 1


@pytest.mark.parametrize(
    ("options", "sharded", "why"),
    [
        (
            ["optimizer.name=schedule_free_adamw"],
            False,
            "schedule_free_adamw trains a copy that lacks them",
        ),
        ([], True, "FSDP2 shards"),
    ],
)
def test_a_table_that_cannot_take_in_the_tokens_of_a_stream_trains_whole(
    base, tmp_path, options, sharded, why
):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(base),
        AutoTokenizer.from_pretrained(base),
    )

    def plan(*more):
        return plan_vocabulary(
            config_for(base, tmp_path, *options, *more), model, tokenizer, [], [], sharded=sharded
        )

    chosen = plan("data.streaming=true")
    assert chosen.mode == "full"
    assert why in chosen.reason
    for mode in ("active", "sampled"):
        with pytest.raises(
            UserError,
            match=rf"vocabulary.mode is {mode}, but .*{why}.*Set vocabulary.mode to full or frozen",
        ):
            plan("data.streaming=true", f"vocabulary.mode={mode}", "vocabulary.num_sampled=9")
    assert plan().mode == plan("vocabulary.mode=active").mode == "active"


@pytest.mark.parametrize(
    ("active", "rows", "spare"), [(11_526, 262_144, 11_526), (500, 49_152, 1024), (300, 400, 100)]
)
def test_a_stream_has_room_for_as_many_tokens_as_are_active_at_its_start(active, rows, spare):
    assert spare_rows(active, rows) == spare


def test_lora_with_active_rows_and_chat_markers(base, tmp_path):
    chats = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a, b in zip(sentences(60, 3), sentences(60, 4))
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    data = [f"data.train={path}", f"data.validation={path}", "data.max_length=128"]
    chat = ["model.chat_template=chatml", "data.format=chat"]
    options = ["vocabulary.mode=active", "model.lora.rank=2"]
    run_training(config_for(base, tmp_path, *options, *chat, *data))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    after, before = table(tmp_path / "run" / "model"), table(base)
    markers = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    moved = (after != before).any(1)
    assert moved[markers].all()
    assert 0.2 < moved.float().mean() < 0.9
    saved = torch.load(tmp_path / "run" / "checkpoints" / "step-00000008" / "model.pt")
    # the shift trains too
    assert saved["model.base_model.model.model.embed_tokens.vocabulary.shift"].any()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model(input_ids=torch.tensor([markers])).logits.isfinite().all()


def test_lora_with_active_rows_trains_those_of_both_tables_if_they_are_not_tied(tmp_path):
    """With lazy_adamw too, which leaves an input table whole without LoRA."""
    path = write_config(
        tmp_path / "run.yaml",
        model={"config": NEOX, "tokenizer": {"vocab_size": 300}},
        data={"train": write_texts(tmp_path / "texts.jsonl", sentences(40)), "max_length": 64},
        optimizer={"name": "lazy_adamw", "lr": 1e-2},
        vocabulary={"mode": "active"},
        training={"max_steps": 3, "batch_size": 4},
        checkpoint={"every": 1, "keep": 9},
    )
    run_training(load_config(path, ["model.lora.rank=2"]))
    first, last = (
        torch.load(tmp_path / "run" / "checkpoints" / f"step-0000000{step}" / "model.pt")
        for step in (1, 3)
    )
    trained = [name for name in first if name.endswith(("embed_in.weight", "lm_head.weight"))]
    assert len(trained) == 2
    assert all((first[name] != last[name]).any() for name in trained)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.lora.rank=2"], "full (LoRA leaves the token table as it is)"),
        (
            ["model.lora.rank=2", "vocabulary.keep=[7]"],
            "frozen (LoRA leaves the token table as it is, except for vocabulary.keep",
        ),
        (["vocabulary.mode=frozen"], "frozen: no row trains, all stay bit for bit"),
        (
            ["vocabulary.mode=sampled", "vocabulary.num_sampled=9"],
            "stay bit for bit what they are, 9 of which take part in a step",
        ),
        (["data.streaming=true"], "would be kept for later tokens)"),
        (
            ["vocabulary.mode=active", "model.lora.rank=2"],
            "0 MB of gradients and optimizer state for them, in addition to LoRA's",
        ),
        (["vocabulary.mode=active", "data.streaming=true"], "train, with room for 1"),
        (
            ["vocabulary.mode=sampled", "vocabulary.num_sampled=1000"],
            "active (a step would draw the whole table)",
        ),
        (["vocabulary.keep=[ban, 7]"], "active (the table is tied"),
    ],
)
def test_inspect_reports_what_would_be_chosen(base, tmp_path, capsys, overrides, expected):
    inspect_data(config_for(base, tmp_path, *overrides), examples=0)
    assert expected in " ".join(capsys.readouterr().out.split())


def test_an_untied_model_stays_full_and_may_have_a_compact_head(tmp_path, capsys):
    path = write_config(
        tmp_path / "neox.yaml",
        model={"config": NEOX, "tokenizer": {"vocab_size": 300}},
        data={"train": write_texts(tmp_path / "wide.jsonl", sentences(100)), "max_length": 64},
        training={"max_steps": 3, "batch_size": 2},
    )
    inspect_data(load_config(path), examples=0)
    printed = " ".join(capsys.readouterr().out.split())
    assert "not tied; lazy_adamw updates only the input rows in use" in printed
    active = load_config(path, ["vocabulary.mode=active"])
    inspect_data(active, examples=0)  # weight decay would move every input row
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "train, the others of the output table stay bit for bit what they are; the input table "
        "trains whole, row by row;"
    ) in printed
    run_training(active)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert (
        len(model.get_output_embeddings().weight)
        == len(model.get_input_embeddings().weight)
        == model.config.vocab_size
        > 290
    )


def test_plan_counts_the_rows_that_train(base, tmp_path):
    full = plan_run(config_for(base, tmp_path, "vocabulary.mode=full"))
    active = plan_run(config_for(base, tmp_path, "vocabulary.mode=active"))
    assert active.memory.optimizer_state < full.memory.optimizer_state
    assert active.memory.gradients < full.memory.gradients
    assert active.model["parameters"] == full.model["parameters"]
    assert active.model["vocabulary"].startswith("active:")


@pytest.mark.parametrize("mode", ["full", "active"])
def test_plan_reports_the_active_rows_and_what_they_cover(base, tmp_path, capsys, mode):
    config = config_for(base, tmp_path, f"vocabulary.mode={mode}")
    held_out = [*sentences(20, seed=2), *sentences(5, words=["ban", "dep"])]
    write_texts(tmp_path / "held_out.jsonl", held_out)
    plan = Planner(config, Display(enabled=False)).plan()
    print_plan(plan, make_console())
    tokenizer = AutoTokenizer.from_pretrained(base)
    train, tokens = (
        [i for text in texts for i in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
        for texts in (sentences(200, seed=1), held_out)
    )
    share = sum(token in train for token in tokens) / len(tokens)
    assert 0.5 < share < 1
    rows = len(table(base))
    shown = " ".join(capsys.readouterr().out.split())
    used = f"{len(set(train))} {len(set(train)) / rows:.1%}"
    assert (
        f"rows of the token table {rows} rows that the training data uses {used} "
        f"held-out tokens with such a row {share:.2%}"
    ) in shown
    always = (
        byte_tokens(tokenizer)
        | template_tokens(tokenizer)
        | {*tokenizer.get_added_vocab().values()}
    )
    active = len(set(train) | set(tokens) | always)
    assert f"{active} of {rows} rows ({active / rows:.1%})" in shown
    assert ("saved" in shown) == (mode == "active")


NOT_AN_ID = "is not allowed: input should be a valid integer or a valid string$"


@pytest.mark.parametrize(
    ("keep", "why"),
    [
        ("[100000]", "vocabulary.keep: 100000 is not a token id"),
        ('[""]', "vocabulary.keep: the text '' has no tokens. Give a text that has some, or a"),
        ("[true]", f"vocabulary.keep.0 = True {NOT_AN_ID}"),
        ("[a, 1.5]", f"vocabulary.keep.1 = 1.5 {NOT_AN_ID}"),
        ("5", r"vocabulary.keep = 5 is not allowed: input should be a list, such as \[5\]"),
    ],
)
def test_a_token_to_keep_that_is_none_is_refused(base, tmp_path, keep, why):
    with pytest.raises(UserError, match=why):
        inspect_data(config_for(base, tmp_path, f"vocabulary.keep={keep}"), examples=0)


@pytest.mark.parametrize("mode", ["auto", "full"])
def test_lora_trains_the_tokens_to_keep_or_says_that_it_does_not(base, tmp_path, mode):
    config = config_for(
        base, tmp_path, "model.lora.rank=2", f"vocabulary.mode={mode}", "vocabulary.keep=[300, 301]"
    )
    if mode == "full":
        with pytest.raises(
            UserError,
            match=r"with LoRA and vocabulary.mode full no row trains\. Set vocabulary.mode",
        ):
            run_training(config)
        return
    run_training(config)
    assert (table(base) != table(tmp_path / "run" / "model")).any(1).nonzero()[:, 0].tolist() == [
        300,
        301,
    ]


def test_new_tokens_with_lora_are_reported(base, tmp_path):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(base),
        AutoTokenizer.from_pretrained(base),
    )
    plan = plan_vocabulary(
        config_for(base, tmp_path, "model.lora.rank=2"), model, tokenizer, [], [398, 399]
    )
    assert (plan.mode, plan.reason) == (
        "full",
        "LoRA leaves the token table as it is, except for 2 new tokens",
    )


def test_frozen_trains_the_tokens_to_keep(base, tmp_path):
    run_training(config_for(base, tmp_path, "vocabulary.mode=frozen", "vocabulary.keep=[300, 301]"))
    moved = (table(base) != table(tmp_path / "run" / "model")).any(1)
    assert moved.nonzero()[:, 0].tolist() == [300, 301]


def test_what_is_dropped_of_unrelated_text_is_said(base, tmp_path, capsys):
    unrelated = tmp_path / "other.jsonl"
    unrelated.write_text('{"text": "ban dep", "url": "x"}\n{"text": 3}\n{"text": "gir"}\n')
    changes = (f"data.unrelated={unrelated}", "data.on_bad_record=drop", "training.max_steps=1")
    run_training(config_for(base, tmp_path, *changes))
    said = capsys.readouterr().err
    assert f"dropped of data.unrelated: 1 record cannot be used: {unrelated} line 2: " in said
    assert "not used: the column 'url' (1 record) of data.unrelated" in said
    assert re.search("unrelated: 2 text examples, .*; 1 bad record dropped", said)
    text = unrelated.rename(tmp_path / "other.txt")
    with pytest.raises(UserError, match=r"other\.txt holds JSON, and its name says plain text"):
        look_at(config_for(base, tmp_path, f"data.unrelated={text}"))


def test_unrelated_text_that_is_none_is_named(base, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"question": "what?"}\n')
    with pytest.raises(UserError, match=r"^data.unrelated, which is plain text: .*other.jsonl"):
        run_training(config_for(base, tmp_path, f"data.unrelated={tmp_path / 'other.jsonl'}"))


def test_a_changed_mode_is_refused_on_resume(base, tmp_path):
    config_for(base, tmp_path)
    command = [
        sys.executable,
        "-m",
        "finetune",
        "train",
        str(tmp_path / "run.yaml"),
        "training.max_steps=2",
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    again = subprocess.run(
        [*command, "--resume", "auto", "vocabulary.mode=full"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 2
    assert "cannot be resumed" in again.stderr


def test_other_tokens_of_the_same_number_are_refused_on_resume(base, tmp_path):
    """The rows in the checkpoint belong to the tokens that were active then."""
    options = ["vocabulary.mode=active", "training.max_steps=2"]
    run_training(config_for(base, tmp_path, *options, "vocabulary.keep=[300]"))
    change = (
        r"the vocabulary changed \(then active, (\d+) rows, their ids hashed (\w+), "
        r"now active, \1 rows, their ids hashed (?!\2)"
    )
    with pytest.raises(UserError, match=change):
        run_training(config_for(base, tmp_path, *options, "vocabulary.keep=[301]"), resume="auto")
    longer = config_for(base, tmp_path, *options, "vocabulary.keep=[300]", "training.max_steps=3")
    assert run_training(longer, resume="auto") == "finished"


@pytest.mark.parametrize("wrong", [-1, 100_000])
def test_a_recorded_token_that_the_model_lacks_is_named(base, tmp_path, wrong):
    run_training(config_for(base, tmp_path, "training.max_steps=1"))
    record = tmp_path / "run" / "vocabulary.json"
    tree = json.loads(record.read_text())
    record.write_text(json.dumps({**tree, "used": [*tree["used"], wrong]}))
    with pytest.raises(UserError, match=f"vocabulary.json names the token {wrong}, and the model"):
        evaluate_target(str(tmp_path / "run"), config=None, overrides=[])
    record.unlink()
    evaluate_target(str(tmp_path / "run"), config=None, overrides=[])
