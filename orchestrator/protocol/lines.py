"""Messages to and from a process of one's own: a line of JSON each, on its stdin and stdout."""

import json
from typing import Any

from orchestrator.errors import ProtocolError
from orchestrator.protocol.codec import from_plain, to_plain


class Lines:
    """Writes and reads messages of some dataclasses."""

    def __init__(self, *kinds: type[Any]) -> None:
        self._kinds = {kind.__name__: kind for kind in kinds}

    def write(self, message: Any) -> str:
        """A message as one line, without its end."""
        return json.dumps({"kind": type(message).__name__, "value": to_plain(message)})

    def read(self, line: str) -> Any:
        """The message that `write` wrote. Raises ProtocolError if it is none."""
        try:
            content = json.loads(line)
            kind = self._kinds[content["kind"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ProtocolError(f"{line[:200]!r} is no message of {', '.join(self._kinds)}: {error!r}") from error
        return from_plain(kind, content["value"])
