"""Rows of a job: of chats, of pairs, of a folder, of a user's data sets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest

from orchestrator.data.rows.prepare_rows import first_rows, prepare_rows
from orchestrator.data.rows.row_store import RowStore
from orchestrator.data.store import IGNORED_TARGET
from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.errors import DataError, EntrypointError
from orchestrator.spec.job import JobSpec
from tests.support.tasks import task_job


def _with_rows(folder: Path, rows: list[Any], task: str = "sft") -> JobSpec:
    job = task_job(task, folder)
    Path(job.data.source).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return job


def _texts(store: RowStore, column: str) -> list[str]:
    """The text of the targets in a column of all training rows."""
    tokenizer = TextTokenizer.load(store.directory / "tokenizer.json")
    rows = store.read("train", np.arange(store.num_rows("train")))
    return [tokenizer.decode(row[column][row[column] != IGNORED_TARGET].tolist()) for row in rows]


def test_only_what_the_assistant_says_has_targets(tmp_path: Path) -> None:
    job = task_job("sft", tmp_path)
    store = prepare_rows(job, tmp_path / "data")
    said = set()
    for line in Path(job.data.source).read_text().splitlines():
        turns = json.loads(line)["messages"]
        said.add("".join(turn["content"] + "\n" for turn in turns if turn["role"] == "assistant"))
    assert {*_texts(store, "targets")} <= said
    units = store.units("train", np.arange(store.num_rows("train")))
    counted = [int((row["targets"] != IGNORED_TARGET).sum()) for row in store.read("train", np.arange(len(units)))]
    assert units.tolist() == counted and store.manifest.splits["train"].num_units == sum(counted)
    assert store.num_rows("train") + store.num_rows("validation") == 60 and store.num_rows("validation") > 3
    everything = job.model_copy(update={"task": job.task.model_copy(update={"assistant_only_loss": False})})
    assert all("user" in text for text in _texts(prepare_rows(everything, tmp_path / "data"), "targets"))


def test_the_same_rows_are_the_same_store_whatever_else_the_job_has(tmp_path: Path) -> None:
    job = task_job("sft", tmp_path)
    store = prepare_rows(job, tmp_path / "data")
    other = task_job("sft", tmp_path, lr=1.0)
    assert prepare_rows(other, tmp_path / "data").directory == store.directory
    shorter = prepare_rows(task_job("sft", tmp_path, sequence_length=20), tmp_path / "data")
    assert shorter.directory != store.directory
    assert shorter.manifest.splits["train"].cut > 0 and store.manifest.splits["train"].cut == 0


def test_pairs_have_answers_alone_as_targets(tmp_path: Path) -> None:
    job = task_job("dpo", tmp_path)
    store = prepare_rows(job, tmp_path / "data")
    rows = [json.loads(line) for line in Path(job.data.source).read_text().splitlines()]
    for kind in ("chosen", "rejected"):
        assert {*_texts(store, f"{kind}_targets")} <= {f"{row[kind]}\n" for row in rows}
    numbers = np.arange(store.num_rows("train"))
    assert store.units("train", numbers).tolist() == [1] * len(numbers)
    lengths = [len(row["chosen_inputs"]) + len(row["rejected_inputs"]) for row in store.read("train", numbers)]
    assert store.lengths("train", numbers).tolist() == lengths


def test_pairs_may_be_whole_chats_of_which_the_beginning_is_the_prompt(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "say river"}]
    rows = [
        {
            "chosen": [*asked, {"role": "assistant", "content": f"river {n}"}],
            "rejected": [*asked, {"role": "assistant", "content": f"stone {n}"}],
        }
        for n in range(20)
    ]
    store = prepare_rows(_with_rows(tmp_path, rows, "dpo"), tmp_path / "data")
    assert all(text.startswith("river ") for text in _texts(store, "chosen_targets"))


def test_a_prompt_beside_whole_chats_is_their_beginning(tmp_path: Path) -> None:
    """As in UltraFeedback: it is in the chats already."""
    asked = {"role": "user", "content": "say river"}
    row = {
        "prompt": "say river",
        "chosen": [asked, {"role": "assistant", "content": "river"}],
        "rejected": [asked, {"role": "assistant", "content": "stone"}],
    }
    store = prepare_rows(_with_rows(tmp_path, [row] * 20, "dpo"), tmp_path / "data")
    assert {*_texts(store, "chosen_targets")} == {"river\n"}


def test_lines_are_counted_as_an_editor_counts_them(tmp_path: Path) -> None:
    job = _with_rows(tmp_path, [GOOD] * 3)
    path = Path(job.data.source)
    path.write_text(path.read_text() + "\n\n" + json.dumps({"messages": [USER]}) + "\n")
    with pytest.raises(DataError, match=r"sft.jsonl:6: the assistant says nothing"):
        prepare_rows(job, tmp_path / "data")


def test_text_that_no_tokenizer_takes_is_named_by_file_and_line(tmp_path: Path) -> None:
    broken = {"messages": [USER, {"role": "assistant", "content": "half \ud800"}]}
    job = _with_rows(tmp_path, [GOOD] * 5)
    tokenizer = tmp_path / "tokenizer.json"
    TextTokenizer.train(["river stone"] * 3, 300).save(tokenizer)
    with Path(job.data.source).open("a") as file:
        file.write(json.dumps(broken) + "\n")
    job = job.model_copy(update={"data": job.data.model_copy(update={"tokenizer": str(tokenizer)})})
    with pytest.raises(DataError, match=r"sft.jsonl:6: .*encode"):
        prepare_rows(job, tmp_path / "data")


def test_a_tokenizer_without_chatmls_tokens_ends_answers_by_its_own(tmp_path: Path) -> None:
    job = task_job("sft", tmp_path, sequence_length=400)
    tokenizer = tmp_path / "tokenizer.json"
    TextTokenizer.train(["river stone user assistant"] * 3, 300).save(tokenizer)
    job = job.model_copy(update={"data": job.data.model_copy(update={"tokenizer": str(tokenizer)})})
    store = prepare_rows(job, tmp_path / "data")
    known = TextTokenizer.load(store.directory / "tokenizer.json")
    for row in store.read("train", np.arange(20)):
        assert known.document_token in row["targets"].tolist()
        assert known.decode(row["inputs"].tolist()).startswith("user: say ")


USER = {"role": "user", "content": "say river"}
SAID = {"role": "assistant", "content": "river"}
GOOD = {"messages": [USER, SAID]}
BAD_CHATS: dict[str, tuple[Any, str]] = {
    "no assistant": ({"messages": [USER]}, "the assistant says nothing in the chat"),
    "no messages": ({"text": "river"}, "no key 'messages'; it has 'text'"),
    "no list": ({"messages": "river"}, "a chat is a list of messages; found 'river'"),
    "no role": ({"messages": [{"content": "river"}]}, "message 1 has no role and content"),
    "cut away": (
        {"messages": [{"role": "user", "content": "river " * 60}, SAID]},
        "nothing that the assistant says is in the first 48 tokens",
    ),
    "no object": ([1], "a JSON list; each line must be an object"),
}


@pytest.mark.parametrize(("row", "message"), BAD_CHATS.values(), ids=BAD_CHATS.keys())
def test_a_bad_chat_is_named_by_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    job = _with_rows(tmp_path, [*[GOOD] * 12, row])
    with pytest.raises(DataError, match=rf"sft.jsonl:13: {message}"):
        prepare_rows(job, tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".rows.lock"]


BAD_PAIRS: dict[str, tuple[Any, str]] = {
    "another prompt": (
        {"prompt": [{"role": "system", "content": "s"}, USER], "chosen": [USER, SAID], "rejected": [USER, USER]},
        "the answers are whole chats, and don't both begin with the prompt",
    ),
    "equal answers": ({"prompt": "p", "chosen": "a", "rejected": "a"}, "a pair needs a prompt, and two answers that"),
    "no prompt": ({"chosen": [SAID], "rejected": [USER]}, "a pair needs a prompt"),
    "one answer": ({"prompt": "p", "chosen": "a"}, "no key 'rejected'"),
}


@pytest.mark.parametrize(("row", "message"), BAD_PAIRS.values(), ids=BAD_PAIRS.keys())
def test_a_bad_pair_is_named_by_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match=rf"dpo.jsonl:4: {message}"):
        prepare_rows(_with_rows(tmp_path, [good, good, good, row], "dpo"), tmp_path / "data")


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the train split has \d rows, and one global batch needs 10"):
        prepare_rows(_with_rows(tmp_path, [GOOD] * 6), tmp_path / "data")


def test_a_users_rows_are_read_once_and_kept(tmp_path: Path) -> None:
    job = task_job("own", tmp_path)
    store = prepare_rows(job, tmp_path / "data")
    assert (store.num_rows("train"), store.num_rows("validation"), store.manifest.num_outputs) == (60, 12, 0)
    first = first_rows(job, 2)
    kept = store.read("train", np.arange(2))
    assert len(first) == 2
    assert all(np.array_equal(given[name], row[name]) for given, row in zip(first, kept, strict=True) for name in row)
    assert first[0]["y"].dtype == np.float32


@pytest.mark.parametrize("units", ["n + 1", "0", "1.5", "[1]"])
def test_a_column_of_units_counts_those_of_a_users_rows(tmp_path: Path, units: str) -> None:
    rows = f"[{{'x': float(n), 'units': {units}}} for n in range(12)]"
    (tmp_path / "counted.py").write_text(f"def rows(split, options):\n    return {rows}")
    job = task_job("own", tmp_path)
    counted = {"entrypoint": "counted:rows", "code_dir": str(tmp_path)}
    job = job.model_copy(update={"data": job.data.model_copy(update=counted)})
    if units == "n + 1":
        assert prepare_rows(job, tmp_path / "data").units("train", np.arange(12)).tolist() == list(range(1, 13))
        return
    for read in (lambda: prepare_rows(job, tmp_path / "data"), lambda: first_rows(job, 2)):
        with pytest.raises(DataError, match="'units' of row 0 of counted:rows for train is .* whole number from 1"):
            read()


def test_classes_are_counted_and_checked(tmp_path: Path) -> None:
    job = task_job("classification", tmp_path)
    assert prepare_rows(job, tmp_path / "data").manifest.num_outputs == 10
    fewer = job.model_copy(update={"task": job.task.model_copy(update={"num_classes": 5})})
    with pytest.raises(DataError, match=r"the label of row \d+ of jobs.rows.digits:rows for train is \d; .* below 5"):
        prepare_rows(fewer, tmp_path / "data")
    renamed = job.model_copy(update={"task": job.task.model_copy(update={"labels": "digit"})})
    with pytest.raises(DataError, match="has no 'digit'; it has 'inputs', 'labels'"):
        prepare_rows(renamed, tmp_path / "data")


def test_inputs_of_a_classification_have_one_shape(tmp_path: Path) -> None:
    rows = "[{'inputs': np.zeros(3 + n // 7), 'labels': 0} for n in range(9)]"
    source = f"import numpy as np\ndef rows(split, options):\n    return {rows}"
    (tmp_path / "ragged.py").write_text(source)
    job = task_job("classification", tmp_path)
    ragged = {"entrypoint": "ragged:rows", "code_dir": str(tmp_path)}
    job = job.model_copy(update={"data": job.data.model_copy(update=ragged)})
    with pytest.raises(
        DataError, match=r"inputs of row 7 of ragged:rows for train has the shape \(4,\), and .* \(3,\)"
    ):
        prepare_rows(job, tmp_path / "data")


def test_a_folder_that_datasets_saved_is_rows_too(tmp_path: Path) -> None:
    pixels = pyarrow.array(
        [[[float(n), 1.0], [2.0, 3.0]] for n in range(40)], pyarrow.list_(pyarrow.list_(pyarrow.float32()))
    )
    table = pyarrow.table({"pixels": pixels, "digit": [n % 4 for n in range(40)], "file": ["a.png"] * 40})
    folder = tmp_path / "saved"
    folder.mkdir()
    with pyarrow.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as file:
        file.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    job = task_job("classification", tmp_path)
    plain = JobSpec.model_validate(
        {
            **job.model_dump(by_alias=True, exclude_unset=True),
            "task": {"name": "classification", "inputs": "pixels", "labels": "digit"},
            "data": {"source": str(folder)},
        }
    )
    store = prepare_rows(plain, tmp_path / "data")
    assert store.manifest.num_outputs == 4 and store.num_rows("train") + store.num_rows("validation") == 40
    assert store.read("train", np.array([0]))[0]["pixels"].shape == (2, 2)
    assert {name: column.dtype for name, column in store.manifest.columns.items()} == {"pixels": "<f4", "digit": "<i8"}

    with pyarrow.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.drop(["file"]).schema) as file:
        file.write_table(table.drop(["file"]))
    own = plain.model_dump(by_alias=True) | {"task": {"entrypoint": "mine:task"}}
    of_own = JobSpec.model_validate(own | {"data": {"source": str(folder), "format": "arrays"}})
    again = prepare_rows(of_own, tmp_path / "data")
    assert again.manifest.columns == store.manifest.columns and again.manifest.num_outputs == 0
    assert again.num_rows("train") + again.num_rows("validation") == 40


def test_what_is_missing_in_a_column_is_refused(tmp_path: Path) -> None:
    for number, missing in enumerate(([None], None)):
        folder = tmp_path / str(number)
        folder.mkdir()
        table = pyarrow.table({"inputs": pyarrow.array([[1.0]] * 30 + [missing]), "labels": [0] * 31})
        with pyarrow.ipc.new_stream(str(folder / "data.arrow"), table.schema) as file:
            file.write_table(table)
        job = task_job("classification", tmp_path)
        sections = {"task": "classification", "data": {"source": str(folder)}}
        job = JobSpec.model_validate({**job.model_dump(by_alias=True, exclude_unset=True), **sections})
        with pytest.raises(DataError, match=r"inputs of .*data.arrow:31 is .* must be an array of numbers"):
            prepare_rows(job, tmp_path / "data")


BAD_CODE: dict[str, tuple[str, str]] = {
    "raises": ("1 / 0", "for train raised ZeroDivisionError"),
    "an iterator": ("return iter([])", "returned a .*iterator for train, which has no length or no rows by number"),
    "nothing": ("return None", "returned None for train"),
    "no rows": ("return []", "returned no rows for train"),
    "a row that raises": ("return Rows()", "row 0 of .* for train raised KeyError"),
}


@pytest.mark.parametrize(("body", "message"), BAD_CODE.values(), ids=BAD_CODE.keys())
def test_rows_that_a_users_code_does_not_give_are_named(tmp_path: Path, body: str, message: str) -> None:
    job = task_job("own", tmp_path)
    module = f"rows_{abs(hash(body))}"
    source = "class Rows:\n    __len__ = lambda self: 30\n    def __getitem__(self, n): return {}['x']\n"
    (tmp_path / f"{module}.py").write_text(f"{source}def rows(split, options):\n    {body}\n")
    job = job.model_copy(update={"data": job.data.model_copy(update={"entrypoint": f"{module}:rows"})})
    with pytest.raises(EntrypointError, match=message):
        prepare_rows(job, tmp_path / "data")


def test_a_source_without_rows_is_refused(tmp_path: Path) -> None:
    job = task_job("sft", tmp_path)
    (tmp_path / "only.txt").write_text("no rows")
    job = job.model_copy(update={"data": job.data.model_copy(update={"source": str(tmp_path / "only.txt")})})
    with pytest.raises(DataError, match=r"has no row: 0 files of .jsonl"):
        prepare_rows(job, tmp_path / "data")
