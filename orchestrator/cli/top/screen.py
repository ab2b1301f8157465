"""The live screen of a cluster's runs: a thin layer over `cli.top.view`. Imports Textual.

A thread polls the cluster once a second and passes each result to the screen that is shown; requests run in threads
too, so the screen never waits for the cluster.
"""

import threading
from collections.abc import Sequence
from contextlib import suppress
from statistics import fmean
from typing import ClassVar

from rich.text import Text
from textual import events, on
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.css.query import NoMatches
from textual.widgets import DataTable, Footer, Sparkline, Static

from orchestrator.cli.top.look import Look
from orchestrator.cli.top.run_requests import Client, RunRequests
from orchestrator.cli.top.steering import LookWanted, Steering
from orchestrator.cli.top.view import RunView, columns, in_order, no_steps, remarks, row_of, view_of
from orchestrator.protocol.status import RunPhase, RunStatus

LOOK_EVERY_S = 1.0
BAR = 24  # cells
GAP = 2  # cells that a column takes in addition to its width
GREEN, FAINT = "#8fce7e", "#8595a3"
COLOURS = {
    RunPhase.QUEUED: "#e8c15f",
    RunPhase.STARTING: "#7fb0dc",
    RunPhase.TRAINING: GREEN,
    RunPhase.RESCALING: "#e8c15f",
    RunPhase.RECOVERING: "bold #e8a15f",
    RunPhase.FINISHING: "#7fb0dc",
    RunPhase.SUCCEEDED: FAINT,
    RunPhase.FAILED: "bold #ee6a5b",
    RunPhase.STOPPED: FAINT,
    RunPhase.PAUSED: "#b79ac8",
}


class RunsScreen(Steering):
    """All runs, one a row."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "open", "Open", priority=True)]

    def __init__(self, requests: RunRequests) -> None:
        super().__init__(requests)
        self._statuses: tuple[RunStatus, ...] = ()
        self._look: Look | None = None

    def compose(self) -> ComposeResult:
        yield Static(id="title", markup=False)
        yield Static(id="trouble", markup=False)
        yield DataTable(cursor_type="row", zebra_stripes=False)
        yield Static(id="remarks", markup=False)
        yield Footer(show_command_palette=False)

    @property
    def chosen(self) -> str | None:
        row = self.query_one(DataTable).cursor_row
        return self._statuses[row].run_id if 0 <= row < len(self._statuses) else None

    def show(self, look: Look) -> None:
        super().show(look)
        chosen, table = self.chosen, self.query_one(DataTable)
        self._look, self._statuses = look, in_order(look.statuses)
        rows = [row_of(status, look.newest.get(status.run_id)) for status in self._statuses]
        table.clear(columns=True)
        shown = columns(rows, self.size.width, GAP)
        for column in shown:
            table.add_column(column.header, width=column.width, key=column.field)
        for row in rows:
            cells = [Text(str(getattr(row, column.field)), no_wrap=True, overflow="ellipsis") for column in shown]
            cells[1].stylize(COLOURS[row.phase])
            table.add_row(*cells, key=row.run_id)
        names = [status.run_id for status in self._statuses]
        if chosen in names:
            table.move_cursor(row=names.index(chosen))
        self._remark()

    def on_data_table_row_highlighted(self) -> None:
        self._remark()

    def on_data_table_row_selected(self) -> None:
        self.action_open()

    def on_resize(self, event: events.Resize) -> None:
        if self._look is not None:
            self.show(self._look)

    def action_open(self) -> None:
        if self.chosen is not None:
            self.app.push_screen(RunScreen(self._requests, self.chosen))

    def _remark(self) -> None:
        chosen = next((status for status in self._statuses if status.run_id == self.chosen), None)
        lines = remarks(chosen, self._look.newest.get(chosen.run_id)) if chosen and self._look else ()
        shown = lines or ("no run yet: `orchestrator submit JOB.yaml` starts one",)
        self.query_one("#remarks", Static).update(Text("\n".join(shown)))


class RunScreen(Steering):
    """One run: its progress, workers, curves, traffic and events."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "app.pop_screen", "Back")]

    def __init__(self, requests: RunRequests, run_id: str) -> None:
        super().__init__(requests)
        self._run_id = run_id

    def compose(self) -> ComposeResult:
        yield Static(id="title", markup=False)
        yield Static(id="trouble", markup=False)
        yield Static(id="head")
        with Horizontal(id="curves"):
            yield Sparkline(id="loss", summary_function=_mean)
            yield Sparkline(id="speed", summary_function=_mean)
        with Horizontal(id="state"):
            with VerticalScroll(id="workers"):
                yield Static(id="workers-text", markup=False)
            with VerticalScroll(id="traffic"):
                yield Static(id="traffic-text", markup=False)
        with VerticalScroll(id="events"):
            yield Static(id="events-text", markup=False)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        for name, title in (
            ("loss", "loss"),
            ("speed", "tokens per second"),
            ("workers", "workers"),
            ("traffic", "communication and protection"),
            ("events", "events, the newest first"),
        ):
            self.query_one(f"#{name}").border_title = title

    @property
    def chosen(self) -> str | None:
        return self._run_id

    def show(self, look: Look) -> None:
        super().show(look)
        status = next((status for status in look.statuses if status.run_id == self._run_id), None)
        if status is None:
            self.query_one("#head", Static).update(Text(f"{self._run_id} is not among the cluster's runs"))
            return
        view = view_of(status, look.opened.events, look.opened.steps, look.opened.goodput)
        self.query_one("#head", Static).update(_head(view))
        for name, curve, digits in (("loss", view.loss, 3), ("speed", view.speed, 0)):
            line = self.query_one(f"#{name}", Sparkline)
            line.data = list(curve)
            line.border_subtitle = f"{curve[0]:,.{digits}f} → {curve[-1]:,.{digits}f}" if curve else no_steps(status)
        for name, lines in (("workers", view.workers), ("traffic", view.traffic), ("events", view.events)):
            text = Text("\n".join(lines))
            self.query_one(f"#{name}-text", Static).update(text)


class TopApp(App[None]):
    """The application.

    Args:
        first: shown before the first poll.
        run_id: opened at once; None for the list of all runs.
    """

    TITLE = "orchestrator top"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    Static { text-wrap: nowrap; text-overflow: ellipsis; }
    VerticalScroll { scrollbar-size-vertical: 1; }
    #title { height: 1; background: $primary; color: $text; text-style: bold; }
    #trouble { height: 1; background: $error; color: $text; display: none; }
    DataTable { height: 1fr; background: $background; }
    #remarks { height: auto; max-height: 4; padding: 0 1; border-top: solid $panel-lighten-2; }
    #head { height: auto; max-height: 5; padding: 0 1; }
    #curves { height: 1fr; min-height: 5; max-height: 12; }
    #curves Sparkline, #workers, #traffic, #events {
        border: round $panel-lighten-2; border-title-color: $foreground; border-subtitle-color: $foreground;
    }
    #curves Sparkline { width: 1fr; height: 100%; }
    #state { height: 1fr; min-height: 6; }
    #workers, #traffic { width: 1fr; padding: 0 1; }
    #events { height: 1fr; min-height: 5; padding: 0 1; }
    Confirmation { align: center middle; }
    #question { text-wrap: wrap; width: 60; max-width: 90%; padding: 1 2; }
    #question { border: round $warning; background: $surface; }
    """

    def __init__(
        self, client: Client, first: Look, run_id: str | None = None, look_every_s: float = LOOK_EVERY_S
    ) -> None:
        super().__init__()
        self._client, self._opened, self._look_every_s = client, run_id, look_every_s
        self._look_now, self._is_over = threading.Event(), False
        self._newest = first

    def on_mount(self) -> None:
        requests = RunRequests(self._client)
        screens: list[Steering] = [RunsScreen(requests)]
        if self._opened is not None:
            screens.append(RunScreen(requests, self._opened))
        for screen in screens:
            self.push_screen(screen)
        # Our own, and a daemon: quitting must not wait for a cluster that doesn't answer. What it imports and starts
        # would delay the first screen.
        screens[-1].call_after_refresh(threading.Thread(target=self._watch, daemon=True).start)

    def on_unmount(self) -> None:
        self._is_over = True
        self._look_now.set()

    @on(LookWanted)
    def look_soon(self) -> None:
        """Show the newest poll at once, and poll again soon."""
        self._show(self._newest)
        self._look_now.set()

    def _watch(self) -> None:
        from orchestrator.cli.top.feed import Feed

        feed = Feed(self._client, self._newest.statuses)
        while not self._is_over:
            self._look_now.clear()
            look = feed.look(self._run_on_screen())
            if not self._is_over:
                with suppress(RuntimeError):  # the application is ending
                    self.call_from_thread(self._show, look)
            self._look_now.wait(self._look_every_s)

    def _run_on_screen(self) -> str | None:
        shown = [screen for screen in self.screen_stack if isinstance(screen, RunScreen)]
        return shown[-1].chosen if shown else None

    def _show(self, look: Look) -> None:
        self._newest = look
        shown = [screen for screen in self.screen_stack if isinstance(screen, Steering)]
        with suppress(NoMatches):  # not composed yet; it will be at the next poll
            shown[-1].show(look)


def _head(view: RunView) -> Text:
    """Its name and phase, a bar of its steps, and figures."""
    text = Text()
    text.append(view.run_id, "bold").append("  ").append(view.phase, COLOURS[view.phase]).append("  ")
    filled = int(BAR * view.done)
    text.append("━" * filled, GREEN).append("━" * (BAR - filled), "#3d4852")
    text.append(f"  step {view.step}  {view.done:.0%}")
    for line in view.figures:
        text.append(f"\n{line}")
    return text


def _mean(values: Sequence[float]) -> float:
    return fmean(values)
