"""The page in headless Chromium: what a person types, reads, stops, and sees on a phone."""

import shutil

import httpx
import pytest

from tests.report.test_browser import CHROMIUM, FLAGS
from tests.serving.browser import Browser
from tests.serving.conftest import slow_and_endless

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on this machine"
    ),
]


@pytest.fixture
def browser(tmp_path):
    started = Browser(CHROMIUM, [flag for flag in FLAGS if "host-resolver" not in flag], tmp_path)
    try:
        yield started
    finally:
        started.close()
        shutil.rmtree(tmp_path, ignore_errors=True)


def is_done(browser):
    return browser.text("#status") == ["done"]


def test_one_question_goes_to_both_models(browser, server):
    browser.show(server.url)
    browser.wait(lambda: browser.text(".side h2"))
    assert browser.text("#title") == ["trained"]
    assert browser.text(".side h2") == ["Before model", "After trained"]
    assert browser.run("document.querySelector('#system').value") == "Be exact."
    browser.type("#text", "What is 3 plus 4?")
    browser.press("Enter")
    browser.wait(lambda: is_done(browser))
    answers = browser.text(".turns .assistant")
    for model, shown in zip(("model", "trained"), answers, strict=True):
        asked = {
            "model": model,
            "messages": [{"role": "user", "content": "What is 3 plus 4?"}],
            "temperature": 0,
        }
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=60).json()
        assert shown == reply["choices"][0]["message"]["content"]
    assert all("tokens/s" in facts for facts in browser.text(".side .about"))
    browser.type("#text", "And 5?")
    browser.click("#send")
    browser.wait(lambda: len(browser.text(".turns .assistant")) == 4 and is_done(browser))
    browser.click("#retry")
    browser.wait(lambda: len(browser.text(".turns .assistant")) == 4 and is_done(browser))
    browser.click("#clear")
    assert browser.text(".turns li") == []
    assert browser.problems == []


def test_an_answer_can_be_stopped(browser, server):
    models = [each.model for each in server.served.models.values()]
    hooks = [model.register_forward_hook(slow_and_endless) for model in models]
    try:
        browser.show(server.url)
        browser.wait(lambda: browser.text(".side h2"))
        browser.run("document.querySelector('#max_new_tokens').value = 1000")
        browser.run("document.querySelector('#temperature').value = 2")
        browser.type("#text", "What is 3 plus 4?")
        browser.press("Enter")
        browser.wait(lambda: all(browser.text(".turns .assistant")))
        browser.click("#stop")
        browser.wait(lambda: is_done(browser))
        assert all("stopped" in facts for facts in browser.text(".side .about"))
        browser.wait(lambda: not server.worker.is_busy)
    finally:
        for hook in hooks:
            hook.remove()
    assert browser.problems == []


def test_a_held_out_prompt_is_scored_against_its_reference(browser, serve, translation_run):
    with serve(translation_run) as server:
        browser.show(server.url)
        browser.wait(lambda: browser.text(".side h2"))
        assert browser.text("#direction option") == ["en → fr"]
        browser.run(
            "document.querySelector('#example').value = 0;"
            "document.querySelector('#example').dispatchEvent(new Event('change'))"
        )
        browser.click("#send")
        browser.wait(lambda: is_done(browser))
        assert "chrF" in browser.text(".side .about")[0]
    assert browser.problems == []


@pytest.mark.parametrize("width", [420, 1400])
def test_nothing_is_wider_than_the_window(browser, server, width):
    browser.show(server.url, width=width)
    browser.wait(lambda: browser.text(".side h2"))
    browser.run("document.querySelector('details').open = true")
    assert browser.run("document.documentElement.scrollWidth") <= width


def test_everything_has_a_name_and_can_be_reached_by_the_keyboard(browser, server):
    browser.show(server.url)
    browser.wait(lambda: browser.text(".side h2"))
    browser.run("document.querySelector('details').open = true")
    unnamed = browser.run(
        "[...document.querySelectorAll('input, select, textarea')]"
        ".filter((e) => e.labels.length === 0).map((e) => e.id)"
    )
    assert unnamed == []
    reached = set()
    for _ in range(30):
        browser.press("Tab")
        reached.add(browser.run("document.activeElement.id"))
    assert {"text", "reference", "send", "system", "temperature", "seed"} <= reached
