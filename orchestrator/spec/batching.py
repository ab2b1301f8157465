"""The `micro_batch_size` key: how much one forward and backward of a worker takes."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator

from orchestrator.spec.section import refuse

AUTO = "auto"
RULE = 'must be a number of rows, at least 1, "N tokens" or auto'


def _micro_batch(value: Any) -> Any:
    if value == AUTO or (isinstance(value, str) and re.fullmatch(r"[1-9]\d{0,8} tokens", value)):
        return value
    if type(value) is not int or value < 1:
        raise refuse(RULE)
    return value


MicroBatch = Annotated[int | str, BeforeValidator(_micro_batch, json_schema_input_type=int | str)]


def tokens_of(micro_batch: int | str) -> int | None:
    """Of "N tokens"; None for what is said in another way."""
    number, _, unit = str(micro_batch).partition(" ")
    return int(number) if unit else None
