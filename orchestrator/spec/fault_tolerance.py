"""The `protection` key: how often each worker's state is copied to another's memory."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator

from orchestrator.spec.section import refuse

EVERY_STEP, AUTO, OFF = "every_step", "auto", "off"
RULE = 'must be every_step, "every N" (N steps), auto or off'


def _protection(value: Any) -> Any:
    if value is False:  # what YAML 1.1 makes of off
        return OFF
    if not isinstance(value, str) or not re.fullmatch(rf"{EVERY_STEP}|{AUTO}|{OFF}|every [1-9]\d{{0,5}}", value):
        raise refuse(RULE)
    return EVERY_STEP if value == "every 1" else value


Protection = Annotated[str, BeforeValidator(_protection, json_schema_input_type=str)]


def interval_of(protection: str) -> int | None:
    """Steps between two snapshots, with auto until costs are known; None where it is off."""
    if protection == OFF:
        return None
    _, _, number = protection.partition(" ")
    return int(number) if number else 1


def whole_every(protection: str, wanted: int) -> int:
    """One of so many snapshots is whole. Only those that follow one another step by step may be deltas."""
    return wanted if protection in (EVERY_STEP, AUTO) else 1
