"""The generated pages and pictures are those of the code as it is."""

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[3] / "docs"
PAGES = runpy.run_path(str(DOCS / "generate.py"))["PAGES"]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_as_new_as_the_code(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == PAGES[name](), "run `python docs/generate.py`"


def test_the_picture_is_as_new_as_its_script() -> None:
    picture = runpy.run_path(str(DOCS / "images" / "architecture.py"))["picture"]
    written = (DOCS / "images" / "architecture.svg").read_text(encoding="utf-8")
    assert written == picture(), "run `python docs/images/architecture.py`"
