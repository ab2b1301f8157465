"""Account of checks: each passes or fails, and a failure goes on to be counted, not to end the run."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Checks:
    """Counts checks, and prints what happens with the time since the beginning.

    Args:
        show: prints a line.
    """

    show: Callable[[str], None] = print
    passed: int = 0
    failures: list[str] = field(default_factory=list)
    began_s: float = field(default_factory=time.monotonic)

    def say(self, line: str) -> None:
        self.show(f"{time.monotonic() - self.began_s:7.1f} s  {line}")

    def check(self, what: str, faults: list[str]) -> None:
        """Count a check, which passes without faults."""
        if not faults:
            self.passed += 1
            return
        self.failures.append(f"{what}: {'; '.join(faults)}")
        self.say(f"FAILED {self.failures[-1]}")

    def summary(self) -> str:
        return f"{self.passed} passed, {len(self.failures)} failed"
