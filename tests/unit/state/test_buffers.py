"""Buffers go from one generation to the next, and never while anything still refers to them."""

import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.state.buffers import PIECE, Buffers

moves_pages = pytest.mark.skipif(sys.platform != "linux", reason="needs mremap")


def test_an_unreferenced_buffer_is_reused_next() -> None:
    buffers = Buffers()
    first = buffers.take(1000)
    address = first.data_ptr()
    del first
    again = buffers.take(900)
    assert (again.data_ptr(), len(again), again.dtype) == (address, 900, torch.uint8)
    assert buffers.made_bytes == buffers.held_bytes == PIECE


@pytest.mark.parametrize(
    "view_of",
    [lambda t: t[64:128].view(torch.float32), lambda t: t.numpy(), lambda t: t[:10].numpy().data],
    ids=["tensor", "array", "memoryview"],
)
def test_a_buffer_is_kept_by_whatever_views_it(view_of: Callable[[torch.Tensor], Any]) -> None:
    buffers = Buffers()
    first = buffers.take(1024)
    address, view = first.data_ptr(), view_of(first)
    del first
    other = buffers.take(1024)
    assert other.data_ptr() != address
    del view
    assert buffers.take(1024).data_ptr() == address


@moves_pages
def test_memory_left_by_buffers_of_any_size_serves_other_sizes() -> None:
    buffers = Buffers()
    left, between = [], []
    for size in (3 * PIECE, PIECE, 4 * PIECE, 2 * PIECE):
        left.append(buffers.take(size))
        between.append(buffers.take(PIECE).fill_(5))
    made = buffers.made_bytes
    left.clear()
    whole = buffers.take(8 * PIECE - 7).fill_(1)
    rest = [buffers.take(PIECE).fill_(2) for _ in range(2)]
    assert buffers.made_bytes == made
    assert bool((whole == 1).all()) and all(bool((each == 2).all()) for each in rest)
    assert all(bool((each == 5).all()) for each in between)
    more = buffers.take(3 * PIECE).fill_(3)
    assert buffers.made_bytes == made + 3 * PIECE and bool((whole == 1).all()) and bool((more == 3).all())


@moves_pages
def test_no_buffer_changes_whatever_else_is_lent_and_no_more_is_held_than_was_lent_at_once() -> None:
    chance, buffers, most = random.Random(5), Buffers(), 0
    lent: list[tuple[torch.Tensor, int]] = []
    for number in range(400):
        if lent and (chance.random() < 0.5 or len(lent) > 8):
            buffer, mark = lent.pop(chance.randrange(len(lent)))
            assert bool((buffer == mark).all())
            del buffer
        else:
            lent.append((buffers.take(chance.randrange(1, 6 * PIECE)).fill_(number % 251), number % 251))
        most = max(most, sum(-(-len(each) // PIECE) * PIECE for each, _ in lent))
    assert all(bool((each == mark).all()) for each, mark in lent)
    assert buffers.made_bytes == buffers.held_bytes == most


def test_what_was_free_for_a_whole_while_can_be_dropped() -> None:
    buffers = Buffers()
    kept, idle, used = buffers.take(PIECE), buffers.take(2 * PIECE), buffers.take(4 * PIECE)
    kept.fill_(7)
    del idle, used
    buffers.drop_idle()  # all were in use before
    buffers.take(4 * PIECE)
    assert buffers.held_bytes == buffers.made_bytes == 7 * PIECE
    buffers.drop_idle()  # of the free ones four were used since
    assert buffers.held_bytes == 5 * PIECE
    buffers.take(4 * PIECE)
    assert buffers.made_bytes == 7 * PIECE
    buffers.take(5 * PIECE)
    assert buffers.made_bytes == 8 * PIECE
    assert bool((kept == 7).all())


def test_what_is_populated_is_there_and_stays() -> None:
    buffers = Buffers()
    lent = buffers.take(PIECE).fill_(7)
    buffers.populate(100 * PIECE)
    buffers.populate(10 * PIECE)
    for _ in range(2):
        buffers.drop_idle()
    assert buffers.held_bytes == buffers.made_bytes == 100 * PIECE
    buffers.take(99 * PIECE).fill_(1)
    assert buffers.made_bytes == 100 * PIECE and bool((lent == 7).all())


def test_more_memory_than_there_is_changes_nothing() -> None:
    buffers = Buffers()
    lent = buffers.take(PIECE).fill_(7)
    del lent
    with pytest.raises(MemoryError, match="no memory for"):
        buffers.take(1 << 60)
    assert buffers.held_bytes == PIECE
    assert bool((buffers.take(PIECE) == 7).all())


@moves_pages
def test_no_memory_is_kept_of_buffers_that_no_longer_exist() -> None:
    buffers = Buffers()
    free, lent = buffers.take(64 * PIECE), buffers.take(32 * PIECE).fill_(7)
    places = {free.data_ptr(), lent.data_ptr()}
    assert _mapped_of(places) == places
    del free, buffers
    assert _mapped_of(places) == {lent.data_ptr()} and bool((lent == 7).all())
    del lent
    assert _mapped_of(places) == set()


def _mapped_of(addresses: set[int]) -> set[int]:
    spans = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
    return {a for a in addresses if any(int(begin, 16) <= a < int(end, 16) for begin, end in spans)}


def test_threads_never_share_a_buffer() -> None:
    buffers, mixed = Buffers(), []

    def use(mark: int) -> None:
        for _ in range(300):
            mine = buffers.take(4096).fill_(mark)
            if not bool((mine == mark).all()):
                mixed.append(mark)

    threads = [threading.Thread(target=use, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not mixed
    assert buffers.made_bytes <= 4 * 2 * PIECE
