"""Keys of a job that may change while its run is active, as `orchestrator set RUN KEY=VALUE` names them."""

from orchestrator.errors import UsageError, nearest
from orchestrator.spec.job import HIGHEST_PRIORITY, LOWEST_PRIORITY, JobSpec

CAN_CHANGE = "What can change is priority, as in priority=5."
UNCHANGED = "Nothing was changed."
OTHER_VERBS = {  # verbs that change what these sections begin with
    "workers": "`orchestrator scale RUN --workers N` changes the number of workers.",
    "autoscale": "`orchestrator scale RUN --workers N`, or auto, overrides it.",
    "curriculum": "`orchestrator curriculum set RUN next` changes the stage.",
}


def priority_of(change: str) -> int:
    """The priority in `priority=N`.

    Raises:
        UsageError: it is no KEY=VALUE, another key, or no priority that a job can have.
    """
    key, separator, value = (part.strip() for part in change.partition("="))
    if not separator:
        raise UsageError(f"{change!r} is no KEY=VALUE", remedy=CAN_CHANGE, unchanged=UNCHANGED)
    if key != "priority":
        raise _refusal(key)
    if not value.removeprefix("-").isdecimal():
        raise UsageError(f"priority is {value!r}; it must be a whole number", unchanged=UNCHANGED)
    check_priority(int(value))
    return int(value)


def check_priority(priority: int) -> None:
    """Raises UsageError for a priority that no job can have."""
    if not LOWEST_PRIORITY <= priority <= HIGHEST_PRIORITY:
        raise UsageError(
            f"priority is {priority}; it must be from {LOWEST_PRIORITY} to {HIGHEST_PRIORITY}", unchanged=UNCHANGED
        )


def _refusal(key: str) -> UsageError:
    section = key.partition(".")[0]
    known = {field.alias or name for name, field in JobSpec.model_fields.items()}
    if section not in known:
        return UsageError(f"{key} is no key of a job", remedy=nearest(section, known) + CAN_CHANGE, unchanged=UNCHANGED)
    return UsageError(
        f"{key} can't change in an active run: its job is fixed when it is submitted, so that every step is of one job",
        remedy=f"{OTHER_VERBS.get(section, 'Submit a new run with another job.')} {CAN_CHANGE}",
        unchanged=UNCHANGED,
    )
