"""Ports for servers that must know theirs before they start."""

import errno
import random
import socket

# Below the ephemeral ports of Linux and above those of Ray's workers: no other process is likely to take a port between
# the look at it and its use.
PORTS = range(20_000, 32_768)


def free_port() -> int:
    """A port of this machine that is not in use."""
    draw = random.SystemRandom()  # other processes of pytest may have the same seed
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port := draw.choice(PORTS)))
                return port
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
