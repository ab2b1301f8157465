"""The live progress of a run on stderr: one line that is rewritten on a terminal, a line every few seconds elsewhere.

Lasting information (a rescale and its stall, a new phase without a terminal) gets a separate line.
"""

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from orchestrator.cli.terminal.format import progress, recovery, rescale
from orchestrator.protocol.status import RunPhase, RunStatus

LINE_EVERY_S = 5.0
LOOK_EVERY_S = 0.5
BAR_WIDTH = 20
ERASE_LINE = "\r\x1b[2K"


def watch_runs(
    look: Callable[[], Sequence[RunStatus]],
    on_change: Callable[[RunStatus], None] | None,
    is_over: Callable[[], bool] = lambda: False,
    look_every_s: float = LOOK_EVERY_S,
) -> None:
    """Poll until all known runs have ended, or Ctrl-C.

    Args:
        on_change: called with each status that is new or has changed; None for live lines on stderr.
        is_over: called before each poll: whether nothing will change after it.
    """
    seen: dict[str, RunStatus] = {}
    lines: dict[str, LiveProgress] = {}
    try:
        while True:
            last_look = is_over()
            found = look()
            for status in found:
                if seen.get(status.run_id) == status:
                    continue
                seen[status.run_id] = status
                if on_change is not None:
                    on_change(status)
                else:
                    lines.setdefault(status.run_id, LiveProgress()).show(status)
            if last_look or all(status.phase.ended for status in found):
                return
            time.sleep(look_every_s)
    except KeyboardInterrupt:
        raise SystemExit(0) from None  # Ctrl-C ends watching
    finally:
        for line in lines.values():
            line.close()


class StatusLine:
    """A line on stderr that a terminal rewrites; elsewhere all lines stay. `close` it at the end.

    Args:
        stream: output; `isatty` decides whether it is a terminal.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self.refreshes = self._stream.isatty()
        self._is_drawn = False

    def draw(self, done: int, whole: int, text: str) -> None:
        """Rewrite the line of a terminal."""
        width = shutil.get_terminal_size().columns - 1
        self._write(f"{ERASE_LINE}{f'{bar(done, whole)} {text}'[:width]}")
        self._is_drawn = True

    def keep(self, line: str) -> None:
        """Write a line that stays."""
        self._write(f"{ERASE_LINE if self.refreshes else ''}{line}\n")

    def close(self) -> None:
        """Erase the line that was rewritten."""
        if self._is_drawn:
            self._write(ERASE_LINE)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class LiveProgress(StatusLine):
    """Progress of one run: `show` every status of it, in order."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self._told_rescales = self._told_recoveries = -1  # generations
        self._warning: str | None = None  # the one shown last
        self._phase: RunPhase | None = None
        self._line = ""
        self._written_s = 0.0

    def show(self, status: RunStatus) -> None:
        for change in (r for r in status.rescales if r.generation > self._told_rescales):
            if change.stall_s is None and not status.phase.ended:
                break  # shown once it has been measured
            self._told_rescales = change.generation
            is_resized = not change.experts_moved and change.experts is None
            self.keep(f"{status.run_id}{' rescaled' if is_resized else ':'} {rescale(change)}")
        for failure in (r for r in status.recoveries if r.generation > self._told_recoveries):
            if failure.stall_s is None and not status.phase.ended:
                break
            self._told_recoveries = failure.generation
            self.keep(f"{status.run_id} recovered: {recovery(failure)}")
        if status.warning and status.warning != self._warning:
            self.keep(f"{status.run_id} continues, but {status.warning}")
        self._warning = status.warning
        line = progress(status)
        if self.refreshes:
            self.draw(status.step, status.steps, line)
        elif line != self._line and (status.phase != self._phase or self._is_due()):
            self.keep(line)
            self._written_s = time.monotonic()
        self._line, self._phase = line, status.phase

    def _is_due(self) -> bool:
        return time.monotonic() - self._written_s >= LINE_EVERY_S


def bar(done: int, whole: int) -> str:
    """A bar of fixed width, for a terminal."""
    filled = BAR_WIDTH * done // max(whole, 1)
    return f"[{'#' * filled}{'-' * (BAR_WIDTH - filled)}]"
