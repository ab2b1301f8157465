"""Label selectors: conditions on the labels with which a cluster's nodes were started.

The syntax is Ray's: `value`, `!value`, `in(a,b)` and `!in(a,b)`. Ray treats a space after a comma as part of the value,
which then no label matches, so spaces are removed here.
"""

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator

from orchestrator.spec.keys.section import refuse

NODE_ID = "ray.io/node-id"  # set by Ray on every node; used to keep workers off nodes that fail
VALUE = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
KEY = re.compile(rf"(?:(?:{VALUE}\.)*{VALUE}/)?{VALUE}")
CONDITION = re.compile(rf"(!?)(?:({VALUE})|in\(({VALUE}(?:,{VALUE})*)\))")


@dataclass(frozen=True)
class Condition:
    """Condition on a node's label: one of `values` or, if `is_negated`, none of them, a missing label included."""

    values: tuple[str, ...]
    is_negated: bool

    @classmethod
    def of(cls, text: str) -> "Condition | None":
        """Parse `text`; None if it is no condition."""
        match = CONDITION.fullmatch(text)
        return None if match is None else cls(tuple((match[2] or match[3]).split(",")), match[1] == "!")


def _selector(selector: dict[str, str]) -> dict[str, str]:
    compact = {key: condition.replace(" ", "") for key, condition in selector.items()}
    for key, condition in compact.items():
        if KEY.fullmatch(key) is None:
            raise refuse(f"must name labels of letters, digits, -, _ and ., with a prefix before / if any; got {key!r}")
        if key == NODE_ID:
            raise refuse(f"must not name {key}, by which workers are kept off nodes that fail")
        if Condition.of(condition) is None:
            raise refuse(
                "must give a condition for each label: value, !value, in(a,b) or !in(a,b), of letters, digits, -, _ "
                f"and .; got {selector[key]!r} for {key}"
            )
    return compact


LabelSelector = Annotated[dict[str, str], AfterValidator(_selector)]
