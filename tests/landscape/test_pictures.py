"""The files: valid SVG that stands alone, every descent with its learning rate, the animation."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from finetune.errors import UserError
from finetune.landscape import (
    LANDSCAPES,
    descend,
    descend_by_default,
    descend_tuned,
    draw_landscapes,
)
from finetune.landscape.animation import FRAMES, LOOKS
from finetune.landscape.pictures import descent_in_words

SVG = "{http://www.w3.org/2000/svg}"
STEPS = 12


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    heard = []
    folder = tmp_path_factory.mktemp("pictures")
    paths = draw_landscapes(
        folder, functions=["saddle"], optimizers=["sgd", "adam"], steps=STEPS, say=heard.append
    )
    return paths, heard


def test_every_descent_is_named_with_its_rate(pictures):
    paths, heard = pictures
    assert [path.name for path in paths] == ["saddle.svg", "saddle-animated.svg", "index.html"]
    ways = (descend_by_default, descend_tuned)
    expected = [
        descent_in_words(way(LANDSCAPES["saddle"], name, STEPS))
        for way in ways
        for name in ("sgd", "adam")
    ]
    assert expected[0].startswith("sgd, lr 0.001: ")
    assert [line.strip() for line in heard if ", lr " in line] == expected
    page = paths[2].read_text(encoding="utf-8")
    assert all(f"<li>{line}</li>" in page for line in expected)
    for path in paths[:2]:
        texts = [
            "".join(element.itertext()).strip() for element in ET.parse(path).iter(f"{SVG}text")
        ]
        assert [text for text in texts if ", lr " in text] == expected
        assert "at the best of the same 19 learning rates, 1e-5 to 10" in texts
        assert f"{STEPS} steps from the ring" in " ".join(texts)


def test_the_page_shows_every_picture_beside_it(pictures):
    page = pictures[0][2].read_text(encoding="utf-8")
    assert re.findall(r'(?:href|src)="([^"]*)"', page) == ["saddle.svg", "saddle-animated.svg"]


def test_the_files_stand_alone(pictures):
    for path in pictures[0][:2]:
        text = path.read_text(encoding="utf-8")
        assert "<script" not in text
        assert re.search(r"<svg [^>]*viewBox", text)
        assert not re.search(r"<svg [^>]*(width|height)=", text)  # it fills what shows it
        assert "prefers-color-scheme: dark" in text
        links = re.findall(r'(?:href|src)="([^"]*)"', text)
        assert links
        assert [link for link in links if not link.startswith(("#", "data:image/png"))] == []


def test_the_animation_moves_from_the_start_to_the_end_at_rest(pictures):
    still, animated = (ET.parse(path) for path in pictures[0][:2])
    assert not list(still.iter(f"{SVG}animate"))
    heads = list(animated.iter(f"{SVG}animateTransform"))
    trails = [mask.find(f"{SVG}polyline") for mask in animated.iter(f"{SVG}mask")]
    assert len(heads) == len(trails) == 4
    for head, trail in zip(heads, trails):
        frames = np.array(
            [[float(v) for v in frame.split(",")] for frame in head.get("values").split(";")]
        )
        line = np.array(
            [[float(v) for v in point.split(",")] for point in trail.get("points").split()]
        )
        assert len(frames) == FRAMES
        assert len(line) == STEPS + 1
        assert (frames[0] == line[0]).all()
        assert (frames[-1] == line[-1]).all()
        hidden = [float(v) for v in trail.find(f"{SVG}animate").get("values").split(";")]
        assert hidden[0] == pytest.approx(
            np.linalg.norm(np.diff(line, axis=0), axis=1).sum() + 1, abs=1.0
        )  # all of it
        assert hidden == sorted(hidden, reverse=True)
        assert hidden[-1] == pytest.approx(1.0)  # the point that a stroke of no length would leave


def test_every_look_differs_in_colour_and_marker_and_the_same_run_gives_the_same_file(
    pictures, tmp_path
):
    assert (
        len({look.colour for look in LOOKS})
        == len({look.marker for look in LOOKS})
        == len(LOOKS)
        == 7
    )
    assert len({look.dashes for look in LOOKS}) >= len(LOOKS) - 1
    for before, after in zip(
        pictures[0],
        draw_landscapes(tmp_path, functions=["saddle"], optimizers=["sgd", "adam"], steps=STEPS),
    ):
        assert before.read_bytes() == after.read_bytes()


def test_words_for_a_descent():
    diverged, slow = descend(LANDSCAPES["rosenbrock"], "sgd", [1.0, 1e-5], steps=9)
    assert re.fullmatch(r"sgd, lr 1: diverges at step \d", descent_in_words(diverged))
    assert re.fullmatch(
        r"sgd, lr 1e-5 \(an end of the grid\): ends [\d.]+ above the minimum",
        descent_in_words(slow),
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"functions": ["beal"]}, "Did you mean 'beale'"),
        ({"functions": []}, "no landscape was named"),
        ({"optimizers": ["adm"]}, "there is no optimizer 'adm'"),
        ({"optimizers": ["lazy_adamw"]}, "made for a model's matrices"),
        ({"optimizers": []}, "1 to 7 different ones"),
        ({"optimizers": ["sgd", "sgd"]}, "1 to 7 different ones"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_mistakes(given, message, tmp_path):
    with pytest.raises(UserError, match=message):
        draw_landscapes(
            tmp_path / "out", **{"functions": ["beale"], "optimizers": ["sgd"], "steps": 3, **given}
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["saddle.svg", "saddle-animated.svg", "index.html"])
def test_a_file_that_finetune_did_not_draw_is_not_replaced(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} would be replaced, and finetune did not make it"):
        draw_landscapes(tmp_path, functions=["saddle"], optimizers=["sgd"], steps=1)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_folder_of_pictures_can_be_drawn_anew(tmp_path):
    for steps in (1, 2):
        draw_landscapes(tmp_path, functions=["saddle"], optimizers=["sgd"], steps=steps)
    assert "2 steps from the ring" in (tmp_path / "saddle.svg").read_text(encoding="utf-8")


def test_the_command(tmp_path):
    options = [
        "--functions",
        "valley, beale",
        "--optimizers",
        "sgd",
        "--steps",
        "5",
        "--output",
        str(tmp_path / "a" / "b"),
    ]
    command = [sys.executable, "-W", "error", "-m", "finetune", "landscape", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    written = sorted(path.name for path in (tmp_path / "a" / "b").iterdir())
    assert written == [
        ".finetune.json",
        "beale-animated.svg",
        "beale.svg",
        "index.html",
        "valley-animated.svg",
        "valley.svg",
    ]
    assert "sgd, lr 0.001: ends " in done.stdout
