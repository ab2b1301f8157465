import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.prepare import digest_set as seen_module
from orchestrator.data.prepare.digest_set import EMPTY, KEY_BYTES, DigestSet


@given(st.lists(st.one_of(st.binary(min_size=16, max_size=16), st.sampled_from([EMPTY, b"\1" * 16]))))
def test_it_is_a_set(digests: list[bytes]) -> None:
    seen, known = DigestSet(), set()
    for digest in digests:
        assert seen.add(digest) == (digest not in known)
        known.add(digest)
    assert len(seen) == len(known)


def test_it_grows_and_forgets_nothing() -> None:
    seen = DigestSet()
    digests = [hashlib.sha256(str(number).encode()).digest()[:KEY_BYTES] for number in range(20_000)]
    assert all(seen.add(digest) for digest in digests)
    assert not any(seen.add(digest) for digest in digests)
    assert 24 <= len(seen._table) / len(seen) <= 48


def test_equal_places_in_the_table_are_no_equal_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen_module, "FIRST_CAPACITY", 8)
    seen = DigestSet()
    digests = [bytes(8) + number.to_bytes(8, "big") for number in range(1, 100)]
    assert all(seen.add(digest) for digest in digests)
    assert not any(seen.add(digest) for digest in digests)


def test_a_digest_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="15 bytes"):
        DigestSet().add(bytes(15))
