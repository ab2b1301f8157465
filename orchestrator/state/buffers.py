"""Memory for snapshots, kept by a worker from one generation to the next.

Each generation keeps several hundred megabytes of snapshots in a dozen buffers, whose sizes depend on the world's, and
two generations' exist while one follows the other. Taken from malloc, they leave holes that the next ones don't fit,
so the heap grows with every rebuild; and memory that the system has to find first costs 0.2 to 4 s per GB. So a worker
keeps the pages that a buffer has left, and makes the next buffer, of any size, of pages that are free wherever they
are: the kernel moves them to addresses beside each other (mremap), without a copy.
"""

import ctypes
import mmap
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PIECE = 1 << 21  # bytes: a huge page, the least that is handed on
POPULATED_AT_ONCE = 1 << 26  # bytes

MADV_POPULATE_WRITE = 23  # Linux 5.14: populates pages as a write would, and keeps their content
_MADV_HUGEPAGE = 14
_PROT_NONE, _READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE
_PRIVATE, _FIXED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 0x10
_MAYMOVE_FIXED = 3  # of mremap: replaces what is mapped at the new address
_FAILED = ctypes.c_void_p(-1).value


class Buffers:
    """Lends buffers in host memory, and takes each back once no tensor or array refers to it any more: a thread that
    still fills a buffer of an ended generation can't write to the next one's. From any thread.

    Attributes:
        made_bytes: obtained from the system so far.
        held_bytes: of them, those that are lent or free.
    """

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._free: list[_Span] = []
        self._returned = _Returned()
        weakref.finalize(self, self._returned.close, self._free).atexit = False
        self._kept_bytes = 0  # are not given back, even if they are unused
        self._least_free = 0  # bytes, since the last `drop_idle`
        self.made_bytes = self.held_bytes = 0

    def take(self, num_bytes: int) -> Tensor:
        """A flat buffer of bytes with any content. Raises MemoryError."""
        with self._changing:
            self._collect()
            span = self._taken(_rounded(num_bytes))
            self._least_free = min(self._least_free, self._free_bytes())
        lent = _array(span)  # the only array of this memory, and it lives as long as anything made of it
        weakref.finalize(lent, self._returned.add, span).atexit = False
        return torch.from_numpy(lent)[:num_bytes]

    def populate(self, num_bytes: int) -> None:
        """Hold at least so many bytes from now on, lent ones included; what is missing is obtained from the system and
        populated, piece by piece, while others may take buffers. Raises MemoryError."""
        self._kept_bytes = max(self._kept_bytes, num_bytes)
        while True:
            with self._changing:
                size = min(POPULATED_AT_ONCE, _rounded(num_bytes) - self.held_bytes)
                if size <= 0:
                    return
                span = self._made(size)
            populate(range(span[0], span[0] + size, PIECE))
            with self._changing:
                self._free.append(span)

    @property
    def lent_bytes(self) -> int:
        with self._changing:
            self._collect()
            return self.held_bytes - self._free_bytes()

    def drop_idle(self) -> None:
        """Return to the system what was free all the time since the last call, as after a larger world, but nothing of
        what `populate` is to hold."""
        with self._changing:
            self._collect()
            idle = min(self._least_free, self.held_bytes - self._kept_bytes)
            while idle > 0 and self._free:
                address, size = self._free.pop(0)
                dropped = min(_rounded(idle), size)
                _unmap(address, dropped)
                if dropped < size:
                    self._free.insert(0, (address + dropped, size - dropped))
                self.held_bytes -= dropped
                idle -= dropped
            self._least_free = self._free_bytes()

    # -- with the lock -----------------------------------------------------------------------------------------

    def _collect(self) -> None:
        self._free.extend(self._returned.all())

    def _free_bytes(self) -> int:
        return sum(size for _, size in self._free)

    def _made(self, size: int) -> "_Span":
        span = (_mapped(size), size)
        self.made_bytes += size
        self.held_bytes += size
        return span

    def _taken(self, size: int) -> "_Span":
        for place, span in enumerate(self._free):
            if span[1] == size:
                return self._free.pop(place)
        if not _MOVES or not self._free:
            return self._made(size)
        missing = size - self._free_bytes()
        if missing > 0:
            self._free.append(self._made(missing))
        begin = filled = _mapped(size, _PROT_NONE)
        while filled < begin + size:
            address, there = self._free.pop()  # what was left last
            moved = min(there, begin + size - filled)
            _move(address, moved, filled)
            if moved < there:
                self._free.append((address + moved, there - moved))
            filled += moved
        return begin, size


_Span = tuple[int, int]
"""Address and size in bytes of mapped memory, both multiples of `PIECE`."""


class _Returned:
    """Memory of buffers that nothing refers to any more. Finalizers add it, which may run in any thread at any moment,
    one that is taking a buffer included: they must not wait for a lock."""

    def __init__(self) -> None:
        self._spans: deque[_Span] = deque()
        self._is_closed = False

    def add(self, span: _Span) -> None:
        if self._is_closed:
            _unmap(*span)
        else:
            self._spans.append(span)

    def all(self) -> Iterator[_Span]:
        """Yield what was added, each span once."""
        while self._spans:
            yield self._spans.popleft()

    def close(self, free: list[_Span]) -> None:
        """Return this memory, the free one and all that is still lent to the system: nothing will be lent any more."""
        self._is_closed = True
        for span in (*free, *self.all()):
            _unmap(*span)


def populate(pieces: range) -> None:
    """Have the system find the pages at these addresses, in pieces of the range's step; their content stays."""
    for begin in pieces:
        size = min(pieces.step, pieces.stop - begin)
        if _LIBC.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), MADV_POPULATE_WRITE):
            return  # an older kernel: pages are cleared at their first use


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // PIECE) * PIECE


def _array(span: _Span) -> NDArray[np.uint8]:
    address, size = span
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def _c_library() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long]
    with suppress(AttributeError):
        library.mremap.restype = ctypes.c_void_p
    return library


_LIBC = _c_library()


def _mapped(size: int, access: int = _READ_WRITE) -> int:
    """The address of new memory. Raises MemoryError."""
    begin = _LIBC.mmap(None, size + PIECE, access, _PRIVATE, -1, 0)
    if begin == _FAILED:
        raise MemoryError(f"no memory for {size} bytes of snapshots: {os.strerror(ctypes.get_errno())}")
    address = _rounded(begin)
    _unmap(begin, address - begin)
    _unmap(address + size, begin + PIECE - address)
    if access != _PROT_NONE:
        _LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _MADV_HUGEPAGE)
    return address


def _unmap(address: int, size: int) -> None:
    if size and _LIBC.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size)):
        raise OSError(ctypes.get_errno(), f"munmap of {size} bytes at {address:#x}")


def _move(address: int, size: int, to: int) -> None:
    """Move pages to other addresses, with their content. Nothing is mapped at the old ones afterwards."""
    arguments = (ctypes.c_void_p(address), *(ctypes.c_size_t(size),) * 2, ctypes.c_int(_MAYMOVE_FIXED))
    if _LIBC.mremap(*arguments, ctypes.c_void_p(to)) == _FAILED:
        raise MemoryError(f"mremap of {size} bytes at {address:#x}: {os.strerror(ctypes.get_errno())}")


def _can_move() -> bool:
    if sys.platform != "linux":
        return False
    piece, place = _mapped(PIECE), _mapped(PIECE, _PROT_NONE)
    try:
        _move(piece, PIECE, place)
    except MemoryError:
        _unmap(piece, PIECE)
        return False
    finally:
        _unmap(place, PIECE)
    return True


_MOVES = _can_move()  # otherwise a buffer is used again as a whole only
