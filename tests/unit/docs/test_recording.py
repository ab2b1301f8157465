"""The recording of a terminal, and the picture that is made of it."""

import os
import runpy
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

RECORD = runpy.run_path(str(Path(__file__).parents[3] / "docs" / "images" / "record.py"))
EVENTS = [
    (1.0, "Started\r\n"),
    (40.0, "\r\x1b[2K[##--] step 1 <2>"),
    (80.0, "\r\x1b[2K[####] step 2"),
    (90.0, "\r\x1b[2Kw0 is killed\r\n"),
    (100.0, "a" * (RECORD["COLUMNS"] + 1) + "\r\n"),
]


def test_a_screen_has_the_lines_of_the_terminal() -> None:
    screens = [screen for _, screen in RECORD["screens"](EVENTS)]
    assert screens[1][1:] == ("Started", "[##--] step 1 <2>")
    assert screens[3][1:] == ("Started", "w0 is killed", "")
    assert screens[4][3:] == ("a" * RECORD["COLUMNS"], "a", "")


def test_every_line_is_shown_while_it_was_there() -> None:
    kept = RECORD["frames"](RECORD["screens"](EVENTS))
    assert kept[0] == (0.0, (RECORD["PROMPT"],)) and kept[-1][0] == pytest.approx(RECORD["LASTS_S"], abs=0.2)
    spans = {line: (row, begin, end) for row, line, begin, end in RECORD["spans"](kept)}
    assert spans["[##--] step 1 <2>"][2] == spans["[####] step 2"][1]
    assert spans["w0 is killed"][0] == 2 and spans["w0 is killed"][2] is None


def test_the_picture_is_an_svg_with_every_line() -> None:
    root = ElementTree.fromstring(RECORD["picture"](EVENTS))
    texts = {node.text: node.get("class") for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert texts["[##--] step 1 <2>"] == "progress past" and texts["w0 is killed"] == "kill"


def test_a_command_is_recorded_in_a_terminal(tmp_path: Path) -> None:
    script = "import sys, shutil; print(sys.stderr.isatty(), shutil.get_terminal_size().columns)"
    env = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    events = RECORD["record"]([sys.executable, "-c", script], tmp_path, env)
    assert "".join(text for _, text in events).split() == ["True", str(RECORD["COLUMNS"])]
    with pytest.raises(RuntimeError, match="ended with 3"):
        RECORD["record"]([sys.executable, "-c", "raise SystemExit(3)"], tmp_path, env)
