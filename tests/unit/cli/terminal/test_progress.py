import io

import pytest

from orchestrator.cli.terminal.progress import ERASE_LINE, LiveProgress, bar, watch_runs
from orchestrator.protocol.status import RunPhase, RunStatus
from tests.unit.cli.statuses import MEASURED, UNMEASURED, status


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_one_line_that_is_rewritten() -> None:
    terminal = Terminal()
    live = LiveProgress(terminal)
    live.show(status(step=1))
    live.show(status(step=2))
    live.close()
    assert terminal.getvalue().count(ERASE_LINE) == 3 and "\n" not in terminal.getvalue()
    assert terminal.getvalue().endswith(ERASE_LINE)


def test_elsewhere_a_line_is_written_for_a_phase_and_then_only_now_and_then() -> None:
    file = io.StringIO()
    live = LiveProgress(file)
    for step in range(5):
        live.show(status(step=step))
    live.show(status(step=5, phase=RunPhase.RESCALING))
    lines = file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["training", "rescaling"]
    assert "\x1b" not in file.getvalue()


def test_a_rescale_is_printed_once_when_it_has_been_measured() -> None:
    file = io.StringIO()
    live = LiveProgress(file)
    live.show(status(rescales=(UNMEASURED,)))
    assert "rescaled" not in file.getvalue()
    live.show(status(rescales=(MEASURED,)))
    live.show(status(rescales=(MEASURED,)))
    assert file.getvalue().count("rescaled 2 -> 3") == 1


def test_a_warning_is_printed_once() -> None:
    file = io.StringIO()
    live = LiveProgress(file)
    for error in (None, "no one answers", "no one answers", "step 7 differs", "step 7 differs"):
        live.show(status(warning=error))
    assert file.getvalue().count("try continues, but step 7 differs") == 1
    assert file.getvalue().count("try continues, but no one answers") == 1


def test_at_the_end_a_rescale_is_printed_even_unmeasured() -> None:
    file = io.StringIO()
    LiveProgress(file).show(status(phase=RunPhase.FAILED, rescales=(UNMEASURED,)))
    assert "rescaled 3 -> 2" in file.getvalue()


@pytest.mark.parametrize(("done", "drawn"), [(0, 0), (45, 5), (180, 20)])
def test_a_bar_fills(done: int, drawn: int) -> None:
    assert bar(done, 180) == "[" + "#" * drawn + "-" * (20 - drawn) + "]"


def test_watching_prints_each_change_once_and_ends_with_the_last_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.cli.terminal.progress.LOOK_EVERY_S", 0.0)
    over = RunPhase.SUCCEEDED
    looks = iter(
        [
            (status(step=1), status(run_id="other", phase=over)),
            (status(step=1), status(run_id="other", phase=over)),
            (status(step=2, phase=over), status(run_id="other", phase=over)),
        ]
    )
    told: list[RunStatus] = []
    watch_runs(lambda: next(looks), told.append)
    assert [(s.run_id, s.step) for s in told] == [("try", 1), ("other", 61), ("try", 2)]


def test_watching_ends_when_the_journal_is_no_longer_written() -> None:
    told: list[RunStatus] = []
    watch_runs(lambda: (status(),), told.append, is_over=lambda: True)
    assert len(told) == 1
