"""A bucket whose requests, and answers to them, are lost, repeated, late or refused."""

import errno
import random
import threading
from hashlib import sha256
from pathlib import Path

import pytest

from orchestrator.storage.backends.bucket_objects import PART_BYTES, BucketObjects
from orchestrator.storage.backends.patience import Patience
from orchestrator.storage.condition import StorageCondition, refusal
from orchestrator.storage.storage_process import StorageProcess
from tests.support.request_proxy import RequestFault, RequestProxy

SHORT = Patience(answer_s=0.5, upload_s=10.0, retry_s=2.0)
LONG = Patience(answer_s=1.0, upload_s=10.0, retry_s=30.0)
DOUBTFUL = (
    RequestFault.LOST_REQUEST,
    RequestFault.LOST_REPLY,
    RequestFault.LATE_DUPLICATE,
    RequestFault.LATE_REQUEST,
    RequestFault.CONFLICT,
    RequestFault.UNAVAILABLE,
    RequestFault.UNAVAILABLE_DONE,
    RequestFault.STALL,
)


@pytest.fixture
def url(bucket: tuple[str, RequestProxy], request: pytest.FixtureRequest) -> str:
    return f"{bucket[0]}/{sha256(request.node.name.encode()).hexdigest()[:16]}"


@pytest.fixture
def objects(url: str) -> BucketObjects:
    return BucketObjects(url, LONG)


@pytest.fixture
def impatient(url: str) -> BucketObjects:
    return BucketObjects(url, SHORT)


def file_of(path: Path, num_bytes: int) -> Path:
    path.write_bytes(random.Random(num_bytes).randbytes(num_bytes))
    return path


# -- creations ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", [None, *DOUBTFUL], ids=str)
@pytest.mark.parametrize("first", DOUBTFUL, ids=str)
def test_a_doubtful_answer_is_settled_by_reading(
    objects: BucketObjects, proxy: RequestProxy, first: RequestFault, second: RequestFault | None
) -> None:
    proxy.fail("PUT", first, *([second] if second else []))
    assert objects.create("x", b"mine") == b"mine"
    assert set(proxy.deliver_late()) <= {412}
    assert objects.get("x") == b"mine" and objects.names("") == ("x",)


@pytest.mark.parametrize("fault", DOUBTFUL, ids=str)
def test_a_name_that_another_writer_has_taken_stays_its(
    objects: BucketObjects, proxy: RequestProxy, fault: RequestFault
) -> None:
    objects.create("x", b"another's")
    proxy.fail("PUT", fault)
    assert objects.create("x", b"mine") == b"another's"
    assert set(proxy.deliver_late()) <= {412}
    assert objects.get("x") == b"another's"


def test_a_request_that_comes_after_anothers_is_refused(impatient: BucketObjects, proxy: RequestProxy) -> None:
    with proxy.failing("PUT", RequestFault.LATE_REQUEST), pytest.raises(OSError):
        impatient.create("x", b"mine")
    assert impatient.create("x", b"another's") == b"another's"
    assert set(proxy.deliver_late()) == {412}
    assert impatient.get("x") == b"another's"


def test_one_of_32_creations_wins_whatever_is_lost(objects: BucketObjects, proxy: RequestProxy) -> None:
    chance, found, barrier = random.Random(7), list[bytes](), threading.Barrier(32)
    proxy.fail("PUT", *chance.choices([fault for fault in DOUBTFUL if fault is not RequestFault.STALL], k=40))

    def create(data: bytes) -> None:
        barrier.wait()
        found.append(objects.create("x", data))

    threads = [threading.Thread(target=create, args=(bytes([i]) * 100,)) for i in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 32 and set(found) == {objects.get("x")}
    assert set(proxy.deliver_late()) <= {412}
    assert set(found) == {objects.get("x")}


@pytest.mark.parametrize(
    ("fault", "number", "condition"),
    [
        (RequestFault.UNAVAILABLE, errno.EBUSY, StorageCondition.SLOW),
        (RequestFault.CONFLICT, errno.EBUSY, StorageCondition.SLOW),
        (RequestFault.STALL, errno.ETIMEDOUT, StorageCondition.AWAY),
        (RequestFault.LOST_REQUEST, errno.EIO, StorageCondition.AWAY),
    ],
    ids=str,
)
def test_a_creation_that_stays_impossible_is_given_up(
    impatient: BucketObjects, proxy: RequestProxy, fault: RequestFault, number: int, condition: StorageCondition
) -> None:
    with proxy.failing("PUT", fault), pytest.raises(OSError) as raised:
        impatient.create("x", b"mine")
    assert raised.value.errno == number and proxy.requests["PUT"] > 1
    assert refusal("it can't be written", raised.value).condition is condition
    assert impatient.names("") == ()


def test_a_forbidden_creation_is_not_repeated(objects: BucketObjects, proxy: RequestProxy) -> None:
    with proxy.failing("PUT", RequestFault.FORBIDDEN), pytest.raises(PermissionError, match="403 Forbidden") as raised:
        objects.create("x", b"mine")
    assert proxy.requests == {"PUT": 1}
    trouble = refusal("the journal can't be written", raised.value)
    assert trouble.condition is StorageCondition.READ_ONLY
    assert trouble.why == "the journal can't be written: 403 Forbidden (AccessDenied)"


def test_a_result_is_not_known_if_nothing_can_be_read(impatient: BucketObjects, proxy: RequestProxy) -> None:
    proxy.fail("PUT", RequestFault.LOST_REPLY)
    with proxy.failing("GET", RequestFault.UNAVAILABLE), pytest.raises(OSError, match="503"):
        impatient.create("x", b"mine")
    assert impatient.create("x", b"mine") == b"mine"


# -- large objects -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_bytes", [100, 2 * PART_BYTES + 5], ids=["whole", "in parts"])
@pytest.mark.parametrize("method", ["PUT", "POST"])
@pytest.mark.parametrize(
    "fault", [RequestFault.LOST_REQUEST, RequestFault.LOST_REPLY, RequestFault.UNAVAILABLE], ids=str
)
def test_an_upload_is_completed_whatever_is_lost(
    objects: BucketObjects, proxy: RequestProxy, tmp_path: Path, method: str, fault: RequestFault, num_bytes: int
) -> None:
    file = file_of(tmp_path / "file", num_bytes)
    proxy.fail(method, fault)
    written = objects.put("x", file)
    proxy.fail(method)
    assert written.sha256 == sha256(objects.get("x")).hexdigest() == sha256(file.read_bytes()).hexdigest()


def test_an_upload_whose_last_reply_is_lost_has_succeeded(
    objects: BucketObjects, proxy: RequestProxy, tmp_path: Path
) -> None:
    """The request to join its parts finds none when it is sent again."""
    file = file_of(tmp_path / "file", 2 * PART_BYTES)
    proxy.fail("POST", None, RequestFault.LOST_REPLY, RequestFault.GONE)
    assert objects.put("x", file).sha256 == sha256(objects.get("x")).hexdigest()
    assert proxy.requests["HEAD"] == 1


def test_an_upload_that_fails_leaves_no_object(impatient: BucketObjects, proxy: RequestProxy, tmp_path: Path) -> None:
    file = file_of(tmp_path / "file", 3 * PART_BYTES)
    with proxy.failing("PUT", RequestFault.UNAVAILABLE), pytest.raises(OSError, match="503"):
        impatient.put("x", file)
    assert impatient.objects("") == ()
    assert impatient.put("x", file).num_bytes == 3 * PART_BYTES


# -- reads, listings, deletions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [RequestFault.LOST_REPLY, RequestFault.UNAVAILABLE, RequestFault.TORN, RequestFault.STALL], ids=str
)
def test_a_read_is_repeated(objects: BucketObjects, proxy: RequestProxy, fault: RequestFault) -> None:
    data = random.Random(1).randbytes(100_000)
    objects.create("a/x", data)
    proxy.fail("GET", fault)
    assert objects.get("a/x") == data
    proxy.fail("GET", fault)
    assert objects.get("a/x", 10, 70_000) == data[10:70_000]
    proxy.fail("GET", fault)
    assert objects.names("a") == ("x",)


def test_a_read_that_stays_impossible_is_given_up(impatient: BucketObjects, proxy: RequestProxy) -> None:
    with proxy.failing("GET", RequestFault.STALL), pytest.raises(TimeoutError):
        impatient.get("x")
    with proxy.failing("GET", RequestFault.UNAVAILABLE), pytest.raises(OSError, match="503"):
        impatient.names("")


@pytest.mark.parametrize("fault", [RequestFault.LOST_REPLY, RequestFault.UNAVAILABLE], ids=str)
def test_a_deletion_is_repeated(objects: BucketObjects, proxy: RequestProxy, fault: RequestFault) -> None:
    for key in ("x", "y", "z"):
        objects.create(key, b"1")
    proxy.fail("POST", fault)
    objects.delete(["x", "y"])
    assert objects.names("") == ("z",)


# -- other places ------------------------------------------------------------------------------------------------------


def test_a_missing_bucket_is_no_missing_object(bucket: tuple[str, RequestProxy], tmp_path: Path) -> None:
    """Else its journal would be an empty one."""
    objects = BucketObjects("s3://none/run", SHORT)
    file = file_of(tmp_path / "file", 10)
    for call in (
        lambda: objects.create("x", b"1"),
        lambda: objects.put("x", file),
        lambda: objects.get("x"),
        lambda: objects.names(""),
        lambda: objects.objects(""),
        lambda: objects.delete(["x"]),
    ):
        with pytest.raises(OSError, match="there is no such bucket") as raised:
            call()
        assert raised.value.errno == errno.ENODEV


def test_a_missing_server_gives_no_answer(bucket: tuple[str, RequestProxy], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="no connection"):
        BucketObjects("s3://away/run", SHORT).create("x", b"1")


def test_a_child_process_makes_the_calls(bucket: tuple[str, RequestProxy]) -> None:
    objects, process = BucketObjects(f"{bucket[0]}/child"), StorageProcess("test")
    assert process.call(objects.create, "x", b"1") == b"1"
    assert process.call(objects.get, "x") == objects.get("x") == b"1"
    with pytest.raises(FileNotFoundError):
        process.call(objects.get, "y")
    process.close()
