"""Base of both live screens: title, error line, keys that steer the chosen run. Imports Textual."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.screen import ModalScreen, Screen
from textual.widgets import Label, Static

from orchestrator.cli.terminal.format import counted
from orchestrator.cli.top.look import Look
from orchestrator.cli.top.run_requests import Answer, RunRequests


class LookWanted(Message):
    """A screen is shown that has no data, or old data."""


class Confirmation(ModalScreen[bool]):
    """Asks before an action that can't be undone."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "dismiss(True)", "Yes"),
        Binding("n,escape", "dismiss(False)", "No", key_display="n"),
    ]

    def __init__(self, question: str) -> None:
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        yield Label(f"{self._question}\n\n[b]y[/b] yes   [b]n[/b] no", id="question")


class Steering(Screen[None]):
    """A screen on which a run is `chosen`, and keys to steer it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("plus,equals_sign", "scale(1)", "More workers", key_display="+"),
        Binding("minus", "scale(-1)", "Fewer workers", key_display="-"),
        Binding("p", "pause", "Pause"),
        Binding("s", "stop", "Stop"),
        Binding("q,ctrl+c", "app.quit", "Quit", key_display="q"),
    ]

    def __init__(self, requests: RunRequests) -> None:
        super().__init__()
        self._requests = requests

    @property
    def chosen(self) -> str | None:
        raise NotImplementedError

    def on_screen_resume(self) -> None:
        self.post_message(LookWanted())

    def show(self, look: Look) -> None:
        going_on = [status for status in look.statuses if not status.phase.ended]
        held = sum(status.workers_now + status.standbys for status in going_on)
        totals = f"{counted(len(look.statuses), 'run')}, {len(going_on)} going on, {counted(held, 'worker')}"
        if look.is_joining:
            totals = f"joining the cluster, {len(going_on)} going on"
        left, right = f" orchestrator top   {look.address}", f"{totals}   {time.strftime('%H:%M:%S')} "
        self.query_one("#title", Static).update(left + right.rjust(max(0, self.size.width - len(left))))
        trouble = self.query_one("#trouble", Static)
        trouble.update(Text(f" No answer, trying again: {look.trouble}"))
        trouble.display = bool(look.trouble)

    def action_scale(self, change: int) -> None:
        if (run := self.chosen) is not None:
            self._act(lambda: self._requests.scale_by(run, change))

    def action_pause(self) -> None:
        if (run := self.chosen) is not None:
            question = f"Pause {run}? It writes a checkpoint and frees its workers; `orchestrator resume` continues it."
            self._confirm(question, lambda: self._requests.pause(run))

    def action_stop(self) -> None:
        if (run := self.chosen) is not None:
            self._confirm(f"Stop {run}? It ends, with a checkpoint.", lambda: self._requests.stop(run))

    def _confirm(self, question: str, action: Callable[[], Answer]) -> None:
        self.app.push_screen(Confirmation(question), lambda yes: self._act(action) if yes else None)

    def _act(self, action: Callable[[], Answer]) -> None:
        def carry_out() -> None:
            answer = action()
            severity = "error" if answer.is_error else "information"
            with suppress(RuntimeError):  # the screen was closed meanwhile
                self.app.call_from_thread(self.app.notify, answer.text, severity=severity, markup=False)

        if self._requests.is_waiting:
            self.app.notify("Sent once the cluster is joined.")
        threading.Thread(target=carry_out, daemon=True).start()
