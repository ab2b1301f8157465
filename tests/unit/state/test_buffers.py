"""Buffers go from one generation to the next, and never while anything still refers to them."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from orchestrator.state.buffers import MOST_SPARE, Buffers


def test_a_buffer_that_nobody_refers_to_is_the_next_one() -> None:
    buffers = Buffers()
    first = buffers.take(1000)
    address = first.data_ptr()
    del first
    again = buffers.take(900)
    assert (again.data_ptr(), len(again), again.dtype) == (address, 900, torch.uint8)
    assert buffers.made_bytes == 1000


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


def test_a_much_larger_buffer_is_left_to_a_larger_one() -> None:
    buffers = Buffers()
    small, large = buffers.take(1000), buffers.take(4000)
    address = large.data_ptr()
    del small, large
    assert buffers.take(int(1000 / MOST_SPARE) - 1).data_ptr() != address
    assert buffers.take(4000).data_ptr() == address


def test_buffers_that_nothing_has_used_for_a_while_can_be_dropped() -> None:
    buffers = Buffers()
    kept, idle, used = buffers.take(1000), buffers.take(2000), buffers.take(4000)
    kept.fill_(7)
    del idle, used
    buffers.drop_idle()  # both were in use before
    buffers.take(4000)
    assert buffers.made_bytes == 7000
    buffers.drop_idle()  # of the two free ones, one was used since
    buffers.take(4000)
    assert buffers.made_bytes == 7000
    assert buffers.held_bytes == 5000
    buffers.take(2000)
    assert buffers.made_bytes == 9000
    assert bool((kept == 7).all())


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
    assert buffers.made_bytes <= 4 * 2 * 4096
