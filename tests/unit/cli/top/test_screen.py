"""The live screen, driven by Textual's pilot, over what a real client saw."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import DataTable, Sparkline, Static

from orchestrator.cli.top import run_requests
from orchestrator.cli.top.look import Look
from orchestrator.cli.top.run_requests import RunRequests
from orchestrator.cli.top.screen import COLOURS, RunScreen, RunsScreen, TopApp
from orchestrator.cli.top.steering import Confirmation
from orchestrator.protocol.status import RunPhase, RunStatus
from tests.unit.cli.recorded_client import ENDED, RESCALING, RecordedClient

PATIENCE_S = 60.0
Drive = Callable[[Pilot[None]], Awaitable[None]]


async def until(pilot: Pilot[None], condition: Callable[[], bool]) -> None:
    """Let the screen live until it is so."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, [str(each.render()) for each in pilot.app.screen.query(Static)]
        await pilot.pause(0.02)


def text(pilot: Pilot[None], name: str) -> str:
    """Of the screen that is shown; empty while it has none of this name."""
    found = pilot.app.screen.query(f"#{name}")
    return str(found.first(Static).render()) if found else ""


def notice(pilot: Pilot[None]) -> str:
    """Texts of the notifications."""
    return " ".join(note.message for note in pilot.app._notifications)


@pytest.fixture
def client(tmp_path: Path) -> RecordedClient:
    return RecordedClient(tmp_path)


def drive(
    client: RecordedClient,
    script: Drive,
    run: str | None = None,
    size: tuple[int, int] = (80, 24),
    first: Look | None = None,
) -> TopApp:
    """Run the screen while the script lasts."""
    app = TopApp(client, first or Look(client.address), run, look_every_s=0.05)

    async def live() -> None:
        async with app.run_test(size=size) as pilot:
            await script(pilot)

    asyncio.run(live())
    return app


def test_runs_are_listed_and_one_is_opened_and_left(client: RecordedClient) -> None:
    async def script(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: "2 runs, 1 going on, 4 workers" in text(pilot, "title"))
        table = pilot.app.screen.query_one(DataTable)
        assert [str(cell) for cell in table.get_row("quickstart")][:3] == ["quickstart", "training", "112/180"]
        assert "stall 0.83 s" in text(pilot, "remarks")
        await pilot.press("down")
        await until(pilot, lambda: "all 40 steps are done" in text(pilot, "remarks"))
        await pilot.press("up", "enter")
        await until(pilot, lambda: "step 112/180" in text(pilot, "head"))
        assert "rank 2   training" in text(pilot, "workers-text") and "41.3 MB a step" in text(pilot, "traffic-text")
        assert "recovered  w2 lost" in text(pilot, "events-text") and "goodput" in text(pilot, "head")
        assert len(pilot.app.screen.query_one("#loss", Sparkline).data or []) == 39
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(pilot.app.screen, RunsScreen))
        await pilot.press("q")

    assert drive(client, script).return_code == 0


@pytest.mark.parametrize("key", ["q", "ctrl+c"])
def test_one_key_quits_from_either_screen(client: RecordedClient, key: str) -> None:
    async def script(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: "112/180" in text(pilot, "head"))
        await pilot.press(key)

    app = drive(client, script, "quickstart")
    assert app.return_code == 0  # None if it had gone on


def test_what_changes_is_shown_and_the_choice_stays(client: RecordedClient) -> None:
    client.now = RESCALING

    async def script(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: "2 runs" in text(pilot, "title"))
        assert str(pilot.app.screen.query_one(DataTable).get_row("quickstart")[1]) == "rescaling"
        await pilot.press("down")
        client.now = ENDED
        await until(pilot, lambda: "0 going on" in text(pilot, "title"))
        screen = pilot.app.screen
        assert isinstance(screen, RunsScreen) and screen.chosen == "spare"  # which is another row by now

    drive(client, script, size=(160, 50))


def test_scaling_is_requested_at_once_and_a_refusal_is_shown(client: RecordedClient) -> None:
    async def script(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: "112/180" in text(pilot, "head"))
        await pilot.press("plus")
        await until(pilot, lambda: "quickstart: 4 workers wanted" in notice(pilot))
        await pilot.press("minus")
        await until(pilot, lambda: "quickstart: 3 workers wanted" in notice(pilot))
        client.most = 3
        await pilot.press("plus")
        await until(pilot, lambda: "4 workers are more than workers.max" in notice(pilot))

    drive(client, script, "quickstart")
    assert client.requests == [("scale", "quickstart", 4), ("scale", "quickstart", 3)]


@pytest.mark.parametrize(("key", "action"), [("p", "pause"), ("s", "stop")])
def test_what_ends_a_run_is_asked_for_confirmation(client: RecordedClient, key: str, action: str) -> None:
    async def script(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: "2 runs" in text(pilot, "title"))
        for answer in ("n", "escape"):
            await pilot.press(key)
            await until(pilot, lambda: isinstance(pilot.app.screen, Confirmation))
            assert f"{action.capitalize()} quickstart?" in text(pilot, "question")
            await pilot.press(answer)
            await until(pilot, lambda: isinstance(pilot.app.screen, RunsScreen))
        assert client.requests == []
        await pilot.press(key, "y")
        await until(pilot, lambda: "after its current step" in notice(pilot))

    drive(client, script)
    assert client.requests == [(action, "quickstart", None)]


def test_a_cluster_that_is_away_is_a_line_and_is_looked_for_again(client: RecordedClient) -> None:
    async def script(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: "112/180" in text(pilot, "head"))
        trouble = pilot.app.screen.query_one("#trouble", Static)
        assert not trouble.display
        client.is_gone = True
        await until(pilot, lambda: bool(trouble.display))
        assert "No answer, trying again: no cluster answers at 10.0.0.5:6379" in text(pilot, "trouble")
        assert "112/180" in text(pilot, "head")  # as it was seen last
        await pilot.press("plus")
        await until(pilot, lambda: "no cluster answers" in notice(pilot))
        client.is_gone, client.now = False, ENDED
        await until(pilot, lambda: not trouble.display and "180/180" in text(pilot, "head"))

    assert drive(client, script, "quickstart").return_code in (0, None)
    assert client.requests == []


class SlowClient(RecordedClient):
    """A client of a cluster that answers `list` once it `may_answer`."""

    def __init__(self, storage: Path) -> None:
        super().__init__(storage)
        self.may_answer = threading.Event()

    def list(self) -> tuple[RunStatus, ...]:
        self.may_answer.wait(PATIENCE_S)
        return super().list()


@pytest.mark.parametrize("run", [None, "quickstart"])
def test_the_first_look_is_drawn_before_the_first_poll(tmp_path: Path, run: str | None) -> None:
    client = SlowClient(tmp_path)
    first = Look(client.address, RecordedClient.list(client), is_joining=True)

    async def script(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: "joining the cluster, 1 going on" in text(pilot, "title"))
        if run is None:
            assert str(pilot.app.screen.query_one(DataTable).get_row("quickstart")[2]) == "112/180"
        else:
            assert "112/180" in text(pilot, "head") and "no step read yet" in text(pilot, "traffic-text")
        client.is_gone = True
        client.may_answer.set()
        await until(pilot, lambda: "no cluster answers" in text(pilot, "trouble"))
        assert "2 runs, 1 going on" in text(pilot, "title")  # they are shown further

    drive(client, script, run, first=first)


def test_while_the_cluster_is_joined_the_title_shows_it_and_requests_follow(client: RecordedClient) -> None:
    client.is_joining = True

    async def script(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: "joining the cluster, 1 going on" in text(pilot, "title"))
        await pilot.press("plus")
        await until(pilot, lambda: "Sent once the cluster is joined" in notice(pilot))
        client.is_joining = False
        await until(pilot, lambda: "2 runs, 1 going on" in text(pilot, "title"))
        await pilot.press("minus")
        await until(pilot, lambda: "3 workers wanted" in notice(pilot))
        assert notice(pilot).count("Sent once") == 1

    drive(client, script)


class LateClient(RecordedClient):
    """A client whose cluster takes its time."""

    def get(self, run_id: str) -> RunStatus:
        time.sleep(0.01)  # another thread may go on
        return super().get(run_id)


def test_requests_that_waited_for_the_cluster_add_up(tmp_path: Path) -> None:
    client = LateClient(tmp_path)
    client.most = 100
    requests = RunRequests(client)
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda _: requests.scale_by("quickstart", 1), range(8))
    assert {answer.text for answer in answers} == {f"quickstart: {count} workers wanted" for count in range(4, 12)}


def test_a_change_is_of_the_runs_status_once_that_shows_the_last_one(
    client: RecordedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = RunRequests(client)
    assert requests.scale_by("quickstart", 1).text == "quickstart: 4 workers wanted"
    assert requests.scale_by("quickstart", -2).text == "quickstart: 2 workers wanted"
    monkeypatch.setattr(run_requests, "LAG_S", 0.0)
    assert requests.scale_by("quickstart", 1).text == "quickstart: 4 workers wanted"


def test_a_removed_run_is_shown_as_gone(client: RecordedClient) -> None:
    async def script(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: "nobody is not among" in text(pilot, "head"))
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(pilot.app.screen, RunsScreen))

    drive(client, script, "nobody")


def test_without_runs_the_screen_shows_how_to_start_one(client: RecordedClient) -> None:
    client.hides = True

    async def script(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: "no run yet" in text(pilot, "remarks"))
        await pilot.press("enter", "plus", "p", "s")  # nobody is chosen
        assert isinstance(pilot.app.screen, RunsScreen)

    drive(client, script)
    assert client.requests == []


def test_no_line_is_wider_than_a_small_terminal(client: RecordedClient) -> None:
    async def script(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: "112/180" in text(pilot, "head"))
        screen = pilot.app.screen
        assert isinstance(screen, RunScreen) and screen.max_scroll_y == screen.max_scroll_x == 0
        for name in ("title", "head", "curves", "state", "events"):
            region = screen.query_one(f"#{name}").region
            assert region.width == 80 and region.height > 0 and region.bottom <= 24

    drive(client, script, "quickstart")


def test_every_phase_has_its_colour() -> None:
    assert set(COLOURS) == set(RunPhase)
