"""Label selectors: which of a cluster's nodes, by the labels that these were started with.

The syntax is Ray's: `value`, `!value`, `in(a,b)` and `!in(a,b)`. Ray takes a space after a comma for a part of the
value, which then no label has, so spaces are left out here.
"""

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator

from orchestrator.spec.section import refuse

NODE_ID = "ray.io/node-id"  # Ray gives it to every node; a worker is kept off nodes that fail by it
VALUE = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
KEY = re.compile(rf"(?:(?:{VALUE}\.)*{VALUE}/)?{VALUE}")
CONDITION = re.compile(rf"(!?)(?:({VALUE})|in\(({VALUE}(?:,{VALUE})*)\))")


@dataclass(frozen=True)
class Condition:
    """What a node's label must be: one of `values` or, if `is_negated`, none of them, nor need there be any."""

    values: tuple[str, ...]
    is_negated: bool

    @classmethod
    def of(cls, text: str) -> "Condition | None":
        """None if the text is no condition."""
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
                "must say of each label what it is to be: value, !value, in(a,b) or !in(a,b), of letters, digits, -, _ "
                f"and .; got {selector[key]!r} for {key}"
            )
    return compact


LabelSelector = Annotated[dict[str, str], AfterValidator(_selector)]
