"""Set of text digests for deduplication, exact but for collisions of 128 bits, in 24 to 48 bytes each."""

KEY_BYTES = 16
EMPTY = bytes(KEY_BYTES)
FIRST_CAPACITY = 1 << 12


class DigestSet:
    """A set of 16-byte digests: one array with linear probing. A Python set needs three to four times the memory."""

    def __init__(self) -> None:
        self._table = bytearray(FIRST_CAPACITY * KEY_BYTES)
        self._capacity = FIRST_CAPACITY  # a power of two
        self._num_used = 0

    def __len__(self) -> int:
        return self._num_used

    def add(self, digest: bytes) -> bool:
        """Add a digest; returns whether it is new. Raises ValueError for another length."""
        if len(digest) != KEY_BYTES:
            raise ValueError(f"a digest of {len(digest)} bytes; it must have {KEY_BYTES}")
        key = digest if digest != EMPTY else digest[:-1] + b"\1"  # the empty slot's own value
        slot = self._slot_of(key)
        if self._table[slot : slot + KEY_BYTES] == key:
            return False
        self._table[slot : slot + KEY_BYTES] = key
        self._num_used += 1
        if 3 * self._num_used > 2 * self._capacity:
            self._grow()
        return True

    def _slot_of(self, key: bytes) -> int:
        """Byte offset of the key, or of the empty slot for it."""
        slot = int.from_bytes(key[:8], "little") & (self._capacity - 1)
        while True:
            place = slot * KEY_BYTES
            found = self._table[place : place + KEY_BYTES]
            if found in (key, EMPTY):
                return place
            slot = (slot + 1) & (self._capacity - 1)

    def _grow(self) -> None:
        old = self._table
        self._capacity *= 2
        self._table = bytearray(self._capacity * KEY_BYTES)
        for place in range(0, len(old), KEY_BYTES):
            key = bytes(old[place : place + KEY_BYTES])
            if key != EMPTY:
                slot = self._slot_of(key)
                self._table[slot : slot + KEY_BYTES] = key
