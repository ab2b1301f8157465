"""The contract of `Objects` and `LargeObjects`, the same for all storage."""

import random
import threading
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from orchestrator.storage.backends.bucket_objects import PART_BYTES
from orchestrator.storage.objects import LargeObjects, StoredObject
from tests.support.storages import KINDS, MakeStorage, storage_of


@pytest.fixture(scope="module", params=KINDS)
def make(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeStorage]:
    with storage_of(request.param, tmp_path_factory.mktemp(request.param) / "at") as make:
        yield make


@pytest.fixture
def objects(make: MakeStorage) -> LargeObjects:
    return make()


def file_of(path: Path, num_bytes: int, seed: int = 0) -> Path:
    path.write_bytes(random.Random(seed).randbytes(num_bytes))
    return path


def test_an_object_is_created_once(objects: LargeObjects) -> None:
    assert objects.create("a/b", b"first") == b"first"
    assert objects.create("a/b", b"second") == b"first"
    assert objects.create("a/b", b"first") == b"first"  # a repeated call whose reply was lost
    assert objects.get("a/b") == b"first"


@pytest.mark.parametrize("num_bytes", [0, 1, 3 * 2**20])
def test_an_object_is_what_was_created(objects: LargeObjects, num_bytes: int) -> None:
    data = random.Random(num_bytes).randbytes(num_bytes)
    assert objects.create("x", data) == data
    assert objects.get("x") == data


def test_one_of_32_concurrent_creations_wins(objects: LargeObjects) -> None:
    found, barrier = list[bytes](), threading.Barrier(32)

    def create(data: bytes) -> None:
        barrier.wait()
        found.append(objects.create("journal/0", data))

    threads = [threading.Thread(target=create, args=(bytes([i]) * 1000,)) for i in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 32 and set(found) == {objects.get("journal/0")}


def test_an_absent_object_is_not_found(objects: LargeObjects) -> None:
    objects.create("x/a", b"1")
    for key in ("x/b", "x", "y/a"):
        with pytest.raises((FileNotFoundError, IsADirectoryError)):
            objects.get(key)
    with pytest.raises(FileNotFoundError):
        objects.get("x/b", 0, 1)


@pytest.mark.parametrize(
    ("start", "stop"), [(0, None), (0, 4), (3, 7), (3, None), (8, 10), (9, 99), (10, 12), (10, None), (50, 60)]
)
def test_part_of_an_object_is_read_like_a_slice(objects: LargeObjects, start: int, stop: int | None) -> None:
    objects.create("x", b"0123456789")
    assert objects.get("x", start, stop) == b"0123456789"[start:stop]


def test_part_of_an_empty_object_is_empty(objects: LargeObjects) -> None:
    objects.create("x", b"")
    assert objects.get("x", 0, 5) == objects.get("x", 5) == b""


def test_names_are_those_of_objects_and_folders(objects: LargeObjects) -> None:
    assert objects.names("none") == objects.names("") == ()
    for key in ("x/b", "x/a", "x/deeper/c", "xy/d", "z"):
        objects.create(key, key.encode())
    assert objects.names("x") == ("a", "b", "deeper")
    assert objects.names("") == ("x", "xy", "z")
    assert objects.names("x/deeper") == ("c",)
    assert objects.names("z") == objects.names("z/a") == ()  # an object is no folder
    assert objects.objects("z/a") == ()


def test_more_names_than_a_page_of_a_listing(objects: LargeObjects) -> None:
    keys = [f"many/{number:010d}" for number in range(1_050)]
    threads = [
        threading.Thread(target=lambda some: [objects.create(k, b"") for k in some], args=(keys[i::8],))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert objects.names("many") == tuple(key.removeprefix("many/") for key in keys)
    assert [found.key for found in objects.objects("many")] == keys
    objects.delete(keys[:1_040])
    assert [found.key for found in objects.objects("")] == keys[1_040:]


def test_all_objects_below_a_folder_have_their_sizes(objects: LargeObjects) -> None:
    assert objects.objects("none") == ()
    began_s = time.time()
    for key in ("x/b", "x/deeper/and/c", "xy/d"):
        objects.create(key, key.encode())
    assert objects.objects("x") == (StoredObject("x/b", 3), StoredObject("x/deeper/and/c", 14))
    assert [found.key for found in objects.objects("")] == ["x/b", "x/deeper/and/c", "xy/d"]
    assert all(abs(found.written_s - began_s) < 60.0 for found in objects.objects(""))


def test_deletion_skips_what_is_absent(objects: LargeObjects) -> None:
    for key in ("x/a", "x/c", "x/d"):
        objects.create(key, b"1")
    objects.delete(["x/a", "x/b", "x/c", "y/e"])
    objects.delete([])
    assert objects.names("x") == ("d",)
    assert objects.create("x/a", b"2") == b"2"


@pytest.mark.parametrize("num_bytes", [0, 1, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES + 7])
def test_a_file_is_stored_with_its_digest(objects: LargeObjects, tmp_path: Path, num_bytes: int) -> None:
    file = file_of(tmp_path / "file", num_bytes)
    for _ in range(2):  # it may be repeated
        written = objects.put("large/x", file)
        assert (written.num_bytes, written.sha256) == (num_bytes, sha256(file.read_bytes()).hexdigest())
    assert objects.objects("") == (StoredObject("large/x", num_bytes),)
    assert objects.get("large/x") == file.read_bytes()
    assert objects.get("large/x", num_bytes - 5) == file.read_bytes()[num_bytes - 5 :] if num_bytes > 5 else True


def test_an_object_is_never_seen_in_part(objects: LargeObjects, tmp_path: Path) -> None:
    file, ends = file_of(tmp_path / "file", 2 * PART_BYTES), threading.Event()
    seen: set[int] = set()

    def look() -> None:
        while not ends.is_set():
            seen.update(found.num_bytes for found in objects.objects("large"))

    reader = threading.Thread(target=look)
    reader.start()
    for number in range(3):
        objects.put(f"large/{number}", file)
    ends.set()
    reader.join()
    assert seen <= {2 * PART_BYTES}
