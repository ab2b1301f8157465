"""A stream of framed bytes from one worker to another, from memory into memory.

A frame is a JSON header and a body of raw bytes; the receiver acknowledges each complete frame with one byte. A
listener's address includes a random token that a connecting peer must send first, so other connections are rejected.

    address (in the run's rendezvous store) -> Listener.accept / dial -> Stream
"""

import json
import secrets
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self

MAX_HEADER = 1 << 26  # bytes; it may hold the records of many steps
PART = 1 << 22  # bytes handed to the kernel at once
_LENGTHS = struct.Struct("!IQ")
DONE = b"\x06"


class StreamClosed(RuntimeError):
    """The other end is closed, or this one was shut."""

    def __init__(self, why: str) -> None:
        super().__init__(f"connection closed by peer: {why}")


class Listener:
    """Waits for one peer. `address` is what the peer passes to `dial`."""

    def __init__(self, host: str) -> None:
        self._socket = socket.create_server((host, 0), backlog=4)
        self._word = secrets.token_hex(16)
        self.address = f"{host}:{self._socket.getsockname()[1]}:{self._word}"

    def accept(self, timeout_s: float) -> "FramedStream":
        """The stream of the peer that knows the token; others are rejected. Raises StreamClosed if none connects."""
        self._socket.settimeout(timeout_s)
        try:
            while True:
                connection, _ = self._socket.accept()
                connection.settimeout(timeout_s)
                with suppress(OSError, StreamClosed):
                    if secrets.compare_digest(_exactly(connection, len(self._word)), self._word.encode()):
                        return FramedStream(connection)
                connection.close()
        except OSError as error:
            raise StreamClosed(f"no peer connected within {timeout_s:.0f} s: {error}") from error

    def close(self) -> None:
        self._socket.close()


def dial(address: str, timeout_s: float, answer_s: float | None = None) -> "FramedStream":
    """Connect to a listener; `answer_s` is the stream's. Raises StreamClosed if it can't be reached."""
    rest, _, word = address.rpartition(":")
    host, _, port = rest.rpartition(":")
    try:
        connection = socket.create_connection((host, int(port)), timeout=timeout_s)
        connection.sendall(word.encode())
    except OSError as error:
        raise StreamClosed(str(error)) from error
    return FramedStream(connection, answer_s)


class FramedStream:
    """One end of a connection. One thread sends or receives; any other may `shut` it.

    Args:
        answer_s: longest wait for the peer to take `PART` bytes, or to acknowledge a frame; None: no limit.
    """

    def __init__(self, connection: socket.socket, answer_s: float | None = None) -> None:
        self._socket = connection
        self._socket.settimeout(answer_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sent_bytes = 0
        self.received_bytes = 0

    def send(self, header: dict[str, Any], body: memoryview) -> None:
        """Send a frame and return once the receiver has acknowledged it. Raises StreamClosed."""
        text = json.dumps(header).encode()
        try:
            self._socket.sendall(_LENGTHS.pack(len(text), len(body)) + text)
            for start in range(0, len(body), PART):
                self._socket.sendall(body[start : start + PART])
        except OSError as error:
            raise StreamClosed(str(error)) from error
        self.sent_bytes += len(body)
        _exactly(self._socket, len(DONE))

    def receive(self, place: Callable[[dict[str, Any], int], memoryview]) -> dict[str, Any]:
        """Receive a frame; `acknowledge` confirms it.

        Args:
            place: returns the memory for the body, given the header and the body's length.

        Returns:
            the header. Raises StreamClosed.
        """
        header_length, body_length = _LENGTHS.unpack(_exactly(self._socket, _LENGTHS.size))
        if header_length > MAX_HEADER:
            raise StreamClosed(f"a header of {header_length} bytes")
        header: dict[str, Any] = json.loads(_exactly(self._socket, header_length))
        body = place(header, body_length)
        _fill(self._socket, body)
        self.received_bytes += body_length
        return header

    def acknowledge(self) -> None:
        """Confirm the newest frame. Raises StreamClosed."""
        try:
            self._socket.sendall(DONE)
        except OSError as error:
            raise StreamClosed(str(error)) from error

    def shut(self) -> None:
        """End the connection: operations at both ends fail at once."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.shut()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _exactly(connection: socket.socket, length: int) -> bytes:
    data = bytearray(length)
    _fill(connection, memoryview(data))
    return bytes(data)


def _fill(connection: socket.socket, place: memoryview) -> None:
    done = 0
    try:
        while done < len(place):
            count = connection.recv_into(place[done:], min(len(place) - done, PART))
            if count == 0:
                raise StreamClosed("it sent no more data")
            done += count
    except OSError as error:
        raise StreamClosed(str(error)) from error
