"""Part files: what was written, whole and of that making, or nothing."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from orchestrator.data.prepare.block_cache import Footer, Parts, checked, documents_in, lengths_of, written
from orchestrator.errors import DataError
from tests.unit.data.stores import BYTES_ONLY

DOCUMENTS = [([1, 2, 3], 0.5), ([7], float("nan")), (list(range(1000)), -2.25)]


def write(path: Path, made_of: str = "this", dtype: str = "<u2") -> Footer:
    with written(path, made_of, dtype) as part:
        for tokens, score in DOCUMENTS:
            part.add(np.array(tokens, dtype), score)
    footer = checked(path, made_of)
    assert footer is not None
    return footer


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_documents_survive_a_round_trip(tmp_path: Path, dtype: str) -> None:
    footer = write(tmp_path / "part", dtype=dtype)
    assert (footer.num_documents, footer.num_tokens) == (3, 1004)
    found = list(documents_in(tmp_path / "part", footer))
    assert [tokens.tolist() for tokens, _ in found] == [tokens for tokens, _ in DOCUMENTS]
    assert all(tokens.dtype == dtype for tokens, _ in found)
    np.testing.assert_array_equal([score for _, score in found], [score for _, score in DOCUMENTS])
    assert lengths_of(tmp_path / "part", footer).tolist() == [3, 1, 1000]


def test_of_another_making_it_is_none(tmp_path: Path) -> None:
    write(tmp_path / "part")
    assert checked(tmp_path / "part", "that") is None
    assert checked(tmp_path / "gone", "this") is None


def test_a_changed_or_missing_byte_is_found_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "part"
    write(path)
    content = path.read_bytes()
    for at in {0, 5, 2007, 2020, len(content) - 9, len(content) - 8, len(content) - 1, *range(0, len(content), 97)}:
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        assert checked(path, "this") is None, at
        path.write_bytes(content[:at])
        assert checked(path, "this") is None, at
    path.write_bytes(content)
    assert checked(path, "this") is not None


def test_a_part_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with written(tmp_path / "part", "this", "<u2") as part:
            part.add(np.array([1], "<u2"), 0.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_parts_are_held_by_one_process(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from orchestrator.data.prepare.block_cache import Parts\n"
        "with Parts.held(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "store")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(DataError, match="another process prepares"), Parts.held(tmp_path / "store"):
            pass
        other.kill()
    with Parts.held(tmp_path / "store") as parts:
        assert parts.directory.name == ".store.parts"


def test_the_tokenizer_is_kept_whole_or_not(tmp_path: Path) -> None:
    with Parts.held(tmp_path / "store") as parts:
        assert parts.tokenizer() is None
        path = parts.keep_tokenizer(BYTES_ONLY)
        kept = parts.tokenizer()
        assert kept is not None and kept.digest == BYTES_ONLY.digest
        path.write_bytes(path.read_bytes().replace(b"false", b"true", 1))
        assert parts.tokenizer() is None
