"""What all tests share."""

import gc
import os
import signal

import pytest
from hypothesis import settings

from tests.support import devices

REASON = 500  # characters of a failure's reason that are printed at once

# Unset, it would make a local Ray write ~/.ray/auth_token and change how later clusters of this machine start. Tests of
# authentication set their own value in the environment of the processes that they start.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["GOMP_SPINCOUNT"] = "0"  # a thread of torch that waits leaves its processor to the other process of pytest
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # a call that forgets to connect fails, and starts no Ray
os.environ.update(RAY_prestart_worker_first_driver="0")  # as in `local_head`
os.environ.update(RAY_worker_niceness="0")  # else actors wait for the tests of the other process of pytest

for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):  # as the developer's shell may have them
    os.environ.pop(variable, None)

# A busy machine makes single examples slow; pytest-timeout still ends a test that hangs.
settings.register_profile("orchestrator", deadline=None)
settings.load_profile("orchestrator")

# Whoever starts the tests in the background may have them ignore it, and their processes with them: Ctrl-C is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=devices.DEVICES, default=devices.CPU, help="run the tests of this device")


class _Failures:
    """Names each failure and its reason as it happens: tests that a time limit ends print no summary."""

    def __init__(self, reporter: pytest.TerminalReporter) -> None:
        self._reporter = reporter

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = str(report.longrepr) if crash is None else crash.message
            self._reporter.write_line(f"\n{report.nodeid} ({report.when}): {reason[:REASON]}")


def pytest_configure(config: pytest.Config) -> None:
    devices.selected = config.getoption("--device")


def pytest_sessionstart(session: pytest.Session) -> None:
    plugins = session.config.pluginmanager
    if (reporter := plugins.getplugin("terminalreporter")) is not None:
        plugins.register(_Failures(reporter))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", [metafunc.config.getoption("--device")], indirect=True, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    device = config.getoption("--device")

    def is_run(item: pytest.Item) -> bool:
        if device != devices.EMULATED and item.get_closest_marker("emulated"):
            return False
        if device == devices.CPU:
            return item.get_closest_marker("off_cpu") is None
        return "device" in getattr(item, "fixturenames", ()) and item.get_closest_marker("on_cpu") is None

    config.hook.pytest_deselected(items=[item for item in items if not is_run(item)])
    items[:] = [item for item in items if is_run(item)]


@pytest.fixture
def forked_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children with torch are forked from a process that has it."""
    from orchestrator import torch_process
    from tests.support.forked_modules import Forking

    monkeypatch.setattr(torch_process, "subprocess", Forking)


def pytest_collection_finish() -> None:
    """What is loaded by now stays: no later search for garbage goes through all of torch and all tests again."""
    gc.collect()
    gc.freeze()
