"""The report in headless Chromium: no message on the console, no request to anywhere."""

import json
import shutil
import subprocess

import pytest

from finetune.report import write_report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # whatever is asked for, nothing leaves the machine
]

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on this machine"
)


def visit(path, tmp_path):
    """Return the page's document after loading, its console messages, and its network requests.

    Requests of the browser itself do not count.
    """
    log = tmp_path / "net.json"
    options = [
        *FLAGS,
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--log-net-log={log}",
        "--dump-dom",
        path.as_uri(),
    ]
    result = subprocess.run([CHROMIUM, *options], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    console = [line for line in result.stderr.splitlines() if ":CONSOLE" in line]
    requests = [
        event["params"]
        for event in json.loads(log.read_text())["events"]
        if "initiator" in event.get("params", {})
    ]
    asked = {
        request["url"] for request in requests if request["initiator"] != "not an origin"
    }  # the browser's own have none
    return result.stdout, console, sorted(asked)


def test_the_report_opens_without_errors_and_without_a_network(run_folder, tmp_path):
    document, console, asked = visit(write_report(run_folder), tmp_path)
    assert document.count("<svg") == 5
    assert "rose from 20.2 to 34.4" in document
    assert console == []
    assert asked == []


def test_the_check_would_notice(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        '<img src="http://nowhere.invalid/a.png"><script>console.error("broken")</script>'
    )
    _, console, asked = visit(page, tmp_path)
    assert any("broken" in line for line in console)
    assert asked == ["http://nowhere.invalid/a.png"]
