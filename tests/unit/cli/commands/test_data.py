"""`data prepare` up to where a cluster is needed: options, mistakes, progress and the last words."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.cli.commands import data as data_module
from orchestrator.cli.commands.data import ProgressLine, described
from orchestrator.cli.main import main
from orchestrator.cli.terminal.progress import ERASE_LINE
from orchestrator.data.prepare.pipeline import prepare_corpora
from orchestrator.data.prepare.request import Request
from orchestrator.protocol.codec import to_plain


def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, *args: str
) -> tuple[int, str]:
    """Exit code and message of a command that must not start a cluster."""
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["orchestrator", "data", "prepare", *args, "--out", "stores"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not (tmp_path / "stores").exists() and not (tmp_path / "home/clusters").exists()
    return int(end.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["gone.jsonl"], "SOURCE gone.jsonl doesn't exist"),
        (["builtin:stdlib", "--holdout", "1"], "--holdout is 1.0; it must be at least 0 and less than 1"),
        (["builtin:stdlib", "--max-bad", "2"], "--max-bad 2.0: it is a share of the records"),
        (["builtin:stdlib", "--min-chars", "9", "--max-chars", "3"], "--min-chars 9 and --max-chars 3"),
        (["builtin:stdlib", "--weights", "1"], "1 weights for 1 sources"),
        (["builtin:stdlib", "--weights", "one"], "--weights one: numbers with commas"),
        (["builtin:stdlib", "--difficulty", "rareness"], "--difficulty rareness: it must be length, compression"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_named_by_their_options_before_a_cluster_is_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, args: list[str], said: str
) -> None:
    code, told = refused(monkeypatch, capsys, tmp_path, *args)
    assert code == 2 and said in told


def test_a_summary_counts_what_was_left_out(tmp_path: Path) -> None:
    rows = [{"text": f"text {number}"} for number in range(30)] + [{"text": "text 3"}, {"text": " "}, {"body": ""}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    request = Request((str(tmp_path / "a.jsonl"),), vocab_size=300, max_bad=0.1)
    told = described(prepare_corpora(request, tmp_path / "stores", map))
    assert json.loads(json.dumps(to_plain(told))) == to_plain(told)
    assert (told.records, told.empty, told.found) == (33, 1, False)
    lines = dict(data_module._lines(told))
    assert lines["read"] == "33 records, 1 of them without text"
    assert lines["kept"].endswith("a.jsonl: 30 documents, 200 B; left out: 1 duplicates, 1 bad")
    assert lines["quarantine"] == f"{told.store}.quarantine.jsonl"
    plain = described(prepare_corpora(replace(request, max_chars=6), tmp_path / "stores", map))
    assert "20 longer" in dict(data_module._lines(plain))["kept"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_line_per_stage_without_a_terminal() -> None:
    stream = io.StringIO()
    progress = ProgressLine(stream)
    for stage in ("reading", "encoding", "done"):
        for fraction in (0.0, 0.5, 1.0):
            progress.tell(stage, fraction)
    progress.close()
    assert stream.getvalue() == "reading 0%\nencoding 0%\n"


def test_progress_is_a_bar_on_a_terminal_and_leaves_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "REDRAW_EVERY_S", 0.0)
    stream = Terminal()
    progress = ProgressLine(stream)
    progress.tell("encoding", 0.5)
    assert stream.getvalue() == f"{ERASE_LINE}[##########----------] encoding 50%"
    progress.close()
    assert stream.getvalue().endswith(ERASE_LINE)
