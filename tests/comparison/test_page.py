"""comparison.html of a comparison made by hand: its text, that it opens alone, its contrasts."""

import re
from pathlib import Path

import pytest

import finetune.report
from finetune.errors import UserError
from finetune.report.comparison_facts import caveats
from finetune.report.comparison_page import write_comparison
from finetune.report.svg import DASHES, MARKERS, NUM_COLOURS, SERIES_COLOURS, look
from tests.comparison.conftest import made_comparison, write_folder
from tests.report.test_browser import CHROMIUM, FLAGS, visit
from tests.report.test_report import Page, luminance
from tests.serving.browser import Browser


def page_of(folder):
    return Page(write_comparison(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A comparison with its page."""
    folder = write_folder(tmp_path_factory.mktemp("made"))
    write_comparison(folder)
    return folder


@pytest.fixture(scope="module")
def html(folder):
    return (folder / "comparison.html").read_text(encoding="utf-8")


def test_the_page_reports_the_result_and_the_method(html):
    page = Page(html)
    for expected in (
        "adamw wins: test loss 4.420",
        "24 runs, 3 diverged",
        "betas is given to adam and adamw alone: sgd does not take it.",
        "the held-out records choose, and data.test is the test data",
        "fresh runs, with seeds 1 to 3",
        "half a decade apart, all run with seed 0",
        "weight_decay 0.01, betas (0.9, 0.999), amsgrad false",
        "Head: 20 tokens of the vocabulary, 500 of the test targets",
        "A <processor>",
        "finetune compare c.yaml",
        "of 5",
    ):
        assert expected in page.text, expected
    assert re.search(r"adamw\s*best", page.text)


def test_drawings_have_text_alternatives_with_the_numbers(html):
    labels = Page(html).labels
    titles = [label.split(".")[0] for label in labels]
    assert titles == [
        "Test loss, all tokens",
        "Held-out loss against steps",
        "Held-out loss against tokens",
        "Held-out loss against seconds of training",
        "Held-out loss by learning rate",
        "Size of an update",
        "Steps to the target",
        "Optimizer state",
        "Test loss, head, 20 tokens",
        "Test loss, body, 200 tokens",
        "Test loss, tail, 800 tokens",
    ]
    assert "adamw: 4.420." in labels[0]
    assert "adam: best 0.001, tried 0.0001 (5.200)" in labels[4]
    assert "0.01 (diverged)" in labels[4]
    assert "adamw: 7.63 MiB." in labels[7]
    assert "adamw: 8.640." in labels[10]


def test_optimizers_have_one_order_everywhere(html):
    """The best is first: in the tables, in each legend, and in each drawing's words."""
    page = Page(html)
    for label in page.labels:
        places = [re.search(rf"\b{name}: ", label).start() for name in ("adamw", "adam", "sgd")]
        assert places == sorted(places), label
    legends = [
        re.findall(r"<text[^>]*>(adamw|adam|sgd)</text>", drawing)
        for drawing in re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    ]
    assert [names for names in legends if names != ["adamw", "adam", "sgd"]] == []
    rows = re.findall(r'<tr[^>]*><th scope="row">(\w+)', html)
    assert rows[:6] == ["adamw", "adam", "sgd"] * 2


def test_few_seeds_are_shown_one_by_one(tmp_path):
    """An interval of two seeds would be wider than what there is to see."""
    page = page_of(write_folder(tmp_path, seeds=2))
    assert "4.360 and 4.420" in page.text
    assert "one dot a seed" in page.text
    assert "95 % interval" not in page.text.split("How it was measured")[0]


@pytest.mark.parametrize(("load", "warns"), [(1.9, False), (20.3, True)])
def test_a_machine_that_others_used_is_told(load, warns):
    comparison = made_comparison()
    comparison["runs"][0]["load"] = load
    assert any("load of up to 20" in caveat for caveat in caveats(comparison)) == warns


def test_divergence_and_misses_are_shown(tmp_path):
    page = page_of(write_folder(tmp_path, diverged=("sgd",)))
    assert "Not ranked: sgd (1 diverged)." in page.text
    assert "sgd: 1 of 3 reported runs diverged." in page.text
    assert "1 of 5, 1 of 3" in page.text
    assert "sgd: diverged." in page.labels[0]
    assert "sgd: median missed, reached by 0 of 3." in page.labels[6]


def test_one_seed_is_no_winner():
    comparison = made_comparison(seeds=1)
    assert "No clear winner" in comparison["verdict"]["sentences"][0]
    assert caveats(comparison)[0] == "1 seed is too few to tell chance from merit."


def test_one_file_that_asks_for_nothing(folder, html):
    page = Page(html)
    assert [a for a in page.addresses if not a.startswith(("#", "data:,"))] == []
    assert len(page.ids) == len(set(page.ids)) > 50
    assert not re.search(r"https?://|@import|<script", html)
    assert not any(colour in html for colour in SERIES_COLOURS)
    assert len(html) < 400_000
    assert write_comparison(folder).read_text(encoding="utf-8") == html


def test_a_folder_without_a_comparison(tmp_path):
    with pytest.raises(UserError, match="holds no finished comparison"):
        write_comparison(tmp_path)


def test_series_differ_in_line_and_marker_as_well_as_in_colour():
    looks = [look(number) for number in range(len(DASHES) * len(MARKERS))]
    assert len({(one.dashes, one.marker) for one in looks}) == 35
    assert len({one.colour for one in looks[:NUM_COLOURS]}) == NUM_COLOURS


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_series_stand_out_from_their_ground(scheme):
    """The contrast is at least 3, as WCAG 2.2 requires of drawings.

    https://www.w3.org/TR/WCAG22/#non-text-contrast
    """
    folder, number = Path(finetune.report.__file__).parent, ["light", "dark"].index(scheme)
    roots = [
        re.findall(r":root \{(.*?)\}", (folder / name).read_text(), re.DOTALL)[number]
        for name in ("report.css", "comparison.css")
    ]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", "".join(roots)))
    series = [colours[f"series-{n + 1}"] for n in range(NUM_COLOURS)]
    assert len(set(series)) == 8
    for colour in series:
        light, dark = sorted((luminance(colour), luminance(colours["card"])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3, colour


@pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on this machine"
)
def test_it_opens_without_errors_and_without_a_network(folder, tmp_path):
    document, console, asked = visit(folder / "comparison.html", tmp_path)
    assert document.count("<svg") == 11
    assert "adamw wins" in document
    assert console == []
    assert asked == []


@pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on this machine"
)
def test_one_cost_is_drawn_at_a_time_and_nothing_is_wider_than_a_phone(folder, tmp_path):
    browser = Browser(CHROMIUM, FLAGS, tmp_path)
    try:
        browser.show((folder / "comparison.html").as_uri(), width=420)
        shown = "[...document.querySelectorAll('.switch > div')].map((e) => e.offsetHeight > 0)"
        assert browser.run(shown) == [True, False, False]
        browser.click("label[for=cost-seconds]")
        assert browser.run(shown) == [False, False, True]
        assert browser.run("document.documentElement.scrollWidth") <= 420
        assert browser.problems == []
    finally:
        browser.close()
