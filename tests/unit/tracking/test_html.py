"""Pages that need nothing else, and how a browser lays one out."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from orchestrator.tracking.html import FIGURE_SPACE, page_of, svg_of, table_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MEASURE = "<script>document.title = `${document.scrollingElement.scrollWidth} of ${window.innerWidth}`</script>"


def kinds(table: str) -> list[str]:
    return re.findall(r'<th class="(\w+)">', table)


def test_columns_of_numbers_are_aligned_and_the_first_never() -> None:
    rows = (("1", "  12.50 s    4.0%", "forward"), ("2", " 112.50 s   44.0%", "backward"), ("3", "not measured", ""))
    table = table_of(("STEP", "books", ""), rows)
    assert kinds(table) == ["text", "number", "text"]
    assert f"12.50 s{FIGURE_SPACE * 4}4.0%" in table  # HTML would make one space of four
    assert kinds(table_of(("a", "b"), ())) == ["text", "text"]


def test_text_is_escaped_in_the_page() -> None:
    page = page_of("a <b> & c", "x < y", table_of(("<i>", "n"), (("<script>", "1"),), ("a & b",)))
    assert "<script>" not in page and "<i>" not in page and "a &lt;b&gt; &amp; c" in page
    assert "x &lt; y" in page and "<p>a &amp; b</p>" in page


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize("width", [500, 1280])
def test_a_browser_shows_nothing_wider_than_its_window(tmp_path: Path, width: int) -> None:
    figure = Figure(figsize=(10, 3))
    figure.subplots().plot([1, 2, 3])
    cells = tuple(f"{number} and some words" for number in range(12))
    page = page_of("a" * 200, "told", svg_of(figure) + table_of(cells, (cells, cells)))
    file = tmp_path / "page.html"
    file.write_text(page.replace("</html>", f"{MEASURE}</html>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},800", "--dump-dom"]
    command = [str(CHROMIUM), *options, f"--user-data-dir={tmp_path / 'profile'}", file.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=200).stdout
    found = re.search(r"<title>(\d+) of (\d+)</title>", shown)
    assert found is not None, shown[:500]
    assert int(found[1]) <= int(found[2]) <= width
