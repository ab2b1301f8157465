import pytest

from orchestrator.cluster.process_title import title_of


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("scheduler", "scheduler"),
        ("demo/controller", "controller demo"),
        ("demo/tracker", "tracker demo"),
        ("demo/worker/w0", "worker demo/w0"),
    ],
)
def test_a_process_shows_what_it_is(name: str, title: str) -> None:
    assert title_of(name) == title
