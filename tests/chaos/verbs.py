"""Process that makes requests to a cluster as its users do, so that the time of an answer is not that of starting a
command. A request is a line of JSON on its standard input, an answer one on its standard output.

    ["status", "RUN"]     ["get", "RUN"]     ["scale", "RUN", 2]     ["stop", "RUN"]

`status` reads what the controller has published, if that is fresh, as the command does; `get` asks the controller.
"""

import json
import os
import sys
import time
from typing import Any

from orchestrator.client import OrchestratorClient
from orchestrator.cluster.published.status_reader import published_status
from orchestrator.errors import OrchestratorError
from orchestrator.protocol.codec import to_plain


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what Ray prints is no answer
    client: OrchestratorClient | None = None
    for line in sys.stdin:
        began_s = time.monotonic()
        answer: dict[str, Any] = {"code": 0, "value": None, "error": ""}
        try:
            client = client or OrchestratorClient()
            answer["value"] = to_plain(_ask(client, *json.loads(line)))
        except OrchestratorError as error:
            answer |= {"code": error.exit_code, "error": str(error)}
        print(json.dumps(answer | {"seconds": time.monotonic() - began_s}), file=answers, flush=True)


def _ask(client: OrchestratorClient, verb: str, run: str, *args: Any) -> Any:
    if verb == "status":
        return published_status(run, None) or client.get(run)
    return getattr(client, verb)(run, *args)


if __name__ == "__main__":
    main()
