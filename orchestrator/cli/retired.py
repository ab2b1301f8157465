"""Verbs and options of earlier checkouts: each is refused with an error that names the new one."""

from collections.abc import Sequence

from orchestrator.errors import UsageError

VERBS = {
    "validate": "job validate",
    "schema": "job schema",
    "plan": "job plan",
    "list": "ls",
    "cancel": "stop",
    "stage": "curriculum set",
    "kill": "fault kill-worker",
    "checkpoints": "checkpoint ls",
    "audit": "check data",
    "verify": "check replay",
    "export": "model export",
    "eval": "model eval",
    "generate": "model generate",
    "ui": "tracking ui",
    "sync": "tracking sync",
}
OPTIONS = {
    "scale": {"-n": "-w"},
    "resume": {"-n": "-w", "--from": "--step"},
    "ls": {"-w": "--watch"},
    "status": {"-w": "--watch"},
    "report": {"--to": "--out"},
    "job plan": {"-n": "-w"},
    "check replay": {"-n": "-w", "--from": "--step"},
    "model export": {"--to": "--out", "--from": "--step"},
}


def refuse_retired(arguments: Sequence[str]) -> None:
    """Raises UsageError if the command line begins with an old verb or has an old option of its verb."""
    if not arguments:
        return
    if (new := VERBS.get(arguments[0])) is not None:
        raise _refusal(f"`orchestrator {arguments[0]}` is now `orchestrator {new}`", f"orchestrator {new} --help")
    verb = next((verb for verb in OPTIONS if list(arguments[: len(verb.split())]) == verb.split()), None)
    for word in arguments if verb is not None else ():
        option = word.partition("=")[0] if word.startswith("--") else word[:2]
        if (new := OPTIONS[str(verb)].get(option)) is not None:
            raise _refusal(f"{option} of `orchestrator {verb}` is now {new}", f"orchestrator {verb} --help")


def _refusal(message: str, manual: str) -> UsageError:
    return UsageError(message, remedy=f"`{manual}` shows its options.", unchanged="Nothing was changed.")
