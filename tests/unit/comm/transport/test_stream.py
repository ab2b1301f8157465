"""Frames over real sockets: whole, in order, only from peers that know the password, and an error as soon as an end is
shut."""

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.comm.transport.stream import PART, FramedStream, Listener, StreamClosed, dial


@pytest.fixture
def ends() -> Iterator[tuple[FramedStream, FramedStream]]:
    listener = Listener("127.0.0.1")
    ours = dial(listener.address, 60.0)
    with ours, listener.accept(60.0) as theirs:
        listener.close()
        yield ours, theirs


def _receive_into(stream: FramedStream, memory: bytearray, headers: list[dict[str, Any]]) -> None:
    def place(header: dict[str, Any], length: int) -> memoryview:
        assert length == len(memory)
        return memoryview(memory)

    headers.append(stream.receive(place))
    stream.acknowledge()


@pytest.mark.parametrize("length", [0, 1, 10_000_019])
def test_a_frame_arrives_whole(ends: tuple[FramedStream, FramedStream], length: int) -> None:
    ours, theirs = ends
    body = bytes(range(256)) * (length // 256) + bytes(length % 256)
    memory, headers = bytearray(length), list[dict[str, Any]]()
    receiver = threading.Thread(target=_receive_into, args=(theirs, memory, headers))
    receiver.start()
    ours.send({"step": 7, "note": "é"}, memoryview(body))
    receiver.join(60.0)
    assert bytes(memory) == body and headers == [{"step": 7, "note": "é"}]
    assert ours.sent_bytes == theirs.received_bytes == length


def test_a_sender_waits_for_the_answer(ends: tuple[FramedStream, FramedStream]) -> None:
    ours, theirs = ends
    sent = threading.Event()
    sender = threading.Thread(target=lambda: (ours.send({}, memoryview(b"abc")), sent.set()))
    sender.start()
    memory = bytearray(3)
    theirs.receive(lambda header, length: memoryview(memory))
    assert not sent.wait(0.05)
    theirs.acknowledge()
    assert sent.wait(60.0)
    sender.join(60.0)


@pytest.mark.parametrize("which", [0, 1], ids=["one's own end", "the other's end"])
def test_a_waiting_thread_is_freed_when_an_end_is_shut(ends: tuple[FramedStream, FramedStream], which: int) -> None:
    failed = threading.Event()

    def wait() -> None:
        with pytest.raises(StreamClosed, match="connection closed by peer"):
            ends[1].receive(lambda header, length: memoryview(bytearray(length)))
        failed.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    ends[which].shut()
    assert failed.wait(60.0)
    waiter.join(60.0)


def test_a_sender_with_a_limit_waits_for_a_slow_peer_but_not_for_a_silent_one() -> None:
    listener, length = Listener("127.0.0.1"), 8 * PART
    with dial(listener.address, 60.0, answer_s=4.0) as ours, listener.accept(60.0) as theirs:
        memory, began_s = bytearray(length), time.monotonic()

        def receive_slowly() -> None:
            time.sleep(2.1)
            theirs.receive(lambda header, length: memoryview(memory))
            time.sleep(2.1)
            theirs.acknowledge()

        receiver = threading.Thread(target=receive_slowly)
        receiver.start()
        ours.send({}, memoryview(bytes(length)))
        receiver.join(60.0)
        assert time.monotonic() - began_s > 4.0
    with dial(listener.address, 60.0, answer_s=0.3) as ours, listener.accept(60.0):
        for body in (b"abc", bytes(length)):  # not acknowledged, not taken
            with pytest.raises(StreamClosed, match="timed out"):
                ours.send({}, memoryview(body))
    listener.close()


def test_a_stranger_is_turned_away() -> None:
    listener = Listener("127.0.0.1")
    host, port, word = listener.address.split(":")
    stranger = socket.create_connection((host, int(port)), timeout=60.0)
    stranger.sendall(b"0" * len(word))
    friend = dial(listener.address, 60.0)
    accepted = listener.accept(60.0)
    friend.shut()
    with pytest.raises(StreamClosed):
        accepted.receive(lambda header, length: memoryview(bytearray(length)))
    assert stranger.recv(1) == b""
    stranger.close()
    listener.close()


def test_a_connection_without_a_peer_times_out() -> None:
    listener = Listener("127.0.0.1")
    with pytest.raises(StreamClosed, match="no peer connected"):
        listener.accept(0.05)
    address = listener.address
    listener.close()
    with pytest.raises(StreamClosed):
        dial(address, 0.5)
