"""Sample order and micro-batches of real rows, whatever the world."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.data.prepare.job_store import prepare
from orchestrator.data.rows.row_store import RowStore
from orchestrator.data.rows.row_writer import new_rows
from orchestrator.data.store import TokenStore
from orchestrator.sampling.micro_batches import MicroBatchSize
from orchestrator.spec.job import JobSpec
from orchestrator.worker.step.row_batches import RowBatches
from orchestrator.worker.step.token_batches import TokenBatches

SIZE = MicroBatchSize(rows=2)
JOB = {
    "schema": "v1",
    "name": "feed",
    "train": {"max_steps": 50, "global_batch_size": 10, "micro_batch_size": 2, "sequence_length": 16},
    "eval": {"every": 5, "rows": 7},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    directory = tmp_path_factory.mktemp("text")
    for number in range(40):
        (directory / f"{number}.txt").write_text(" ".join(f"word{number * i % 97}" for i in range(200)))
    return prepare(str(directory), 300, 0.2, tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Documents of many lengths, scored by it."""
    directory = tmp_path_factory.mktemp("text")
    for number in range(60):
        (directory / f"{number}.txt").write_text(" ".join(f"word{number * i % 97}" for i in range(5 * number + 5)))
    return prepare(str(directory), 300, 0.2, tmp_path_factory.mktemp("store"), difficulty="length")


def _feed(store: TokenStore, isolate: bool = False) -> TokenBatches:
    job = JobSpec.model_validate({**JOB, "data": {"isolate_documents": isolate}})
    return TokenBatches(job, store, torch.device("cpu"))


def _rows(feed: TokenBatches, step: int, world_size: int) -> torch.Tensor:
    """The global batch as the ranks see it: their micro-batches by number."""
    micro_batches = {}
    for rank in range(world_size):
        part = feed.step(step, rank, world_size, SIZE)
        for micro_batch in part.micro_batches:
            if micro_batch.number is not None:
                assert micro_batch.number not in micro_batches
                micro_batches[micro_batch.number] = micro_batch.batch["inputs"]
    return torch.cat([micro_batches[number] for number in range(len(micro_batches))])


def test_the_order_through_4_2_3_workers_is_that_of_one(store: TokenStore) -> None:
    feed = _feed(store)
    for step, world_size in enumerate([4] * 12 + [2] * 12 + [3] * 12):
        wanted = store.read("train", feed.order.at(step).rows.spans, 16).inputs_RT
        assert torch.equal(_rows(feed, step, world_size), torch.from_numpy(wanted))
        assert torch.equal(_rows(feed, step, world_size), _rows(feed, step, 1))


def test_a_dry_run_gets_rows_of_different_shapes_if_there_are_any(tmp_path: Path) -> None:
    for name, unlike in {"alike": None, "not alike": 5}.items():
        with new_rows(tmp_path) as (writer, named):
            for number in range(8):
                writer.add("train", {"x": np.full(3 - (number == unlike), number)}, f"row {number}")
            writer.finish("test", {}, 0)
            named.append(tmp_path / name)
        task: Any = None  # which only steps need
        job = JobSpec.model_validate(JOB)
        tried = RowBatches(job, RowStore.open(named[0]), task, torch.device("cpu")).rows_to_try()
        assert [row["x"].tolist() for row in tried] == [[0] * 3, [1] * 3 if unlike is None else [5] * 2]


STAGES = [
    {"name": "easy", "difficulty": [0.0, 0.4], "sequence_length": 8, "until": {"steps": 6}},
    {"name": "opening", "pace": {"kind": "root", "steps": 8}, "until": {"tokens": 1600}},
    {"name": "all", "sequence_length": 24},
]


def test_a_curriculum_is_the_same_through_4_2_3_workers(scored: TokenStore) -> None:
    job = JobSpec.model_validate({**JOB, "curriculum": {"signal": "length", "stages": STAGES}})
    feed, alone = TokenBatches(job, scored, torch.device("cpu")), TokenBatches(job, scored, torch.device("cpu"))
    lengths, used = [], 0
    for step, world_size in enumerate([4] * 8 + [2] * 8 + [3] * 8):
        rows = _rows(feed, step, world_size)
        assert torch.equal(rows, _rows(alone, step, 1))
        part = feed.step(step, 0, world_size, SIZE)
        assert (part.first_position, part.num_positions) == (10 * step, 10)
        assert part.sequence_length == rows.shape[1]
        lengths.append((part.stage, rows.shape[1]))
        used += rows.numel()
    assert lengths == [("easy", 8)] * 6 + [("opening", 16)] * 10 + [("all", 24)] * 8
    assert used == 10 * (6 * 8 + 10 * 16 + 8 * 24)


def test_an_easy_stage_has_the_short_documents(scored: TokenStore) -> None:
    job = JobSpec.model_validate({**JOB, "curriculum": {"signal": "length", "stages": STAGES}})
    index_D = scored.index("train")
    spans = TokenBatches(job, scored, torch.device("cpu")).order.at(0).rows.spans
    documents = np.searchsorted(index_D["offset"], spans.start, side="right") - 1
    assert index_D["length"][documents].max() <= np.quantile(index_D["length"], 0.7)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_every_rank_runs_as_many_passes_and_counts_the_same_tokens(store: TokenStore, world_size: int) -> None:
    feed = _feed(store)
    parts = [feed.step(3, rank, world_size, SIZE) for rank in range(world_size)]
    assert len({len(part.micro_batches) for part in parts}) == 1
    assert len({(part.global_units, part.first_position, part.num_positions) for part in parts}) == 1
    batches = [micro_batch.batch for part in parts for micro_batch in part.micro_batches]
    assert sum(int((batch["targets"] != -100).sum()) for batch in batches) == parts[0].global_units
    for part in parts:
        for micro_batch in part.micro_batches:
            assert (micro_batch.number is None) == (len(micro_batch.batch["inputs"]) == 0)
            assert micro_batch.batch["inputs"].shape[1] == 16


def test_smaller_micro_batches_hold_the_same_rows(store: TokenStore) -> None:
    feed = _feed(store)
    wide, narrow = feed.step(3, 0, 1, SIZE), feed.step(3, 0, 1, MicroBatchSize(rows=1))
    assert (wide.num_micro_batches, narrow.num_micro_batches) == (5, 10) and wide.global_units == narrow.global_units
    rows = [torch.cat([micro_batch.batch["inputs"] for micro_batch in part.micro_batches]) for part in (wide, narrow)]
    assert torch.equal(*rows)


def test_validation_reads_the_same_rows_every_time(store: TokenStore) -> None:
    feed = _feed(store)
    one, again = feed.validation(0, 1, SIZE), feed.validation(0, 1, SIZE)
    rows = torch.cat([micro_batch.batch["inputs"] for micro_batch in one.micro_batches])
    assert len(rows) == 7
    assert torch.equal(rows, torch.cat([micro_batch.batch["inputs"] for micro_batch in again.micro_batches]))


def test_documents_are_named_only_where_they_are_isolated(store: TokenStore) -> None:
    assert all("documents" not in micro_batch.batch for micro_batch in _feed(store).step(0, 0, 1, SIZE).micro_batches)
    batch = _feed(store, isolate=True).step(0, 0, 1, SIZE).micro_batches[0].batch
    assert batch["documents"].shape == batch["inputs"].shape


def test_validation_is_the_same_rows_over_all_ranks_of_any_world(store: TokenStore) -> None:
    feed = _feed(store)
    wanted = store.rows("validation", np.arange(7), 16).inputs_RT
    for world_size in (1, 3, 6):
        parts = [feed.validation(rank, world_size, SIZE) for rank in range(world_size)]
        micro_batches = {s.number: s.batch for part in parts for s in part.micro_batches if s.number is not None}
        assert sorted(micro_batches) == list(range(parts[0].num_micro_batches)) == [0, 1, 2, 3]
        assert torch.equal(torch.cat([micro_batches[n]["inputs"] for n in range(4)]), torch.from_numpy(wanted))
        counted = sum(int((batch["targets"] != -100).sum()) for batch in micro_batches.values())
        assert counted == parts[-1].global_units


def test_steps_consume_positions_without_gap_through_many_epochs(store: TokenStore) -> None:
    feed = _feed(store)
    num_steps = 3 * store.num_rows("train", 16) // 10
    parts = [feed.step(step, 0, 1, SIZE) for step in range(0, num_steps, 7)]
    assert [(p.first_position, p.num_positions) for p in parts] == [(10 * s, 10) for s in range(0, num_steps, 7)]


SMALL = {**JOB, "train": {**JOB["train"], "sequence_length": 24}, "data": {"row_format": "documents"}}  # type: ignore[dict-item]


def _batch(feed: TokenBatches, step: int, world_size: int, size: MicroBatchSize) -> dict[tuple[int, ...], int]:
    """Rows of a step, without padding, and how often each is there."""
    found: dict[tuple[int, ...], int] = {}
    for rank in range(world_size):
        for micro_batch in feed.step(step, rank, world_size, size).micro_batches:
            lengths_B = micro_batch.batch["lengths"]
            assert lengths_B is not None
            for row, length in zip(micro_batch.batch["inputs"], lengths_B.tolist(), strict=True):
                assert not row[length:].any()
                key = tuple(row[:length].tolist())
                found[key] = found.get(key, 0) + 1
    return found


@pytest.mark.parametrize("curriculum", [None, {"signal": "length", "stages": [{"name": "all"}]}])
def test_rows_by_document_are_each_of_one_and_all_of_them_once_an_epoch(
    scored: TokenStore, curriculum: dict[str, object] | None
) -> None:
    feed = TokenBatches(JobSpec.model_validate({**SMALL, "curriculum": curriculum}), scored, torch.device("cpu"))
    index_D, tokens = scored.index("train"), scored.num_tokens("train")
    spans = [(s, n) for step in range(200) for s, n in _spans(feed, step)]
    epoch, taken = [], 0
    while taken < tokens:
        epoch.append(spans[len(epoch)])
        taken += epoch[-1][1]
    assert taken == tokens and sorted(epoch)[0][0] == 0
    wanted = [(d["offset"] + n, min(24, d["length"] - n)) for d in index_D for n in range(0, d["length"], 24)]
    assert sorted(epoch) == wanted


def _spans(feed: TokenBatches, step: int) -> list[tuple[int, int]]:
    spans = feed.order.at(step).rows.spans
    return list(zip(spans.start.tolist(), spans.length.tolist(), strict=True))


def test_a_step_by_document_has_the_same_rows_at_any_micro_batch_and_world_size(scored: TokenStore) -> None:
    feed = TokenBatches(JobSpec.model_validate(SMALL), scored, torch.device("cpu"))
    for step in range(6):
        wanted = _batch(feed, step, 1, MicroBatchSize(rows=10))
        assert sum(wanted.values()) == 10
        for world_size, size in [
            (1, MicroBatchSize(rows=2)),
            (3, MicroBatchSize(tokens=50)),
            (4, MicroBatchSize(tokens=9, multiple=4)),
        ]:
            assert _batch(feed, step, world_size, size) == wanted


def test_targets_by_document_are_the_tokens_that_follow_in_it(scored: TokenStore) -> None:
    feed = TokenBatches(JobSpec.model_validate(SMALL), scored, torch.device("cpu"))
    ends = {int(d["offset"] + d["length"]) for d in scored.index("train")}
    part = feed.step(2, 0, 1, MicroBatchSize(tokens=60))
    cut = [micro_batch.batch for micro_batch in part.micro_batches]
    assert part.global_units == sum(int((batch["targets"] != -100).sum()) for batch in cut)
    all_tokens = scored.read("train", feed.order.at(2).rows.spans, 1)
    assert part.global_units == int((all_tokens.targets_RT != -100).sum())
    for batch in cut:
        for inputs, targets, length in zip(batch["inputs"], batch["targets"], batch["lengths"].tolist(), strict=True):
            assert torch.equal(targets[: length - 1], inputs[1:length])
            assert (targets[length:] == -100).all()
    lasts = [s + n in ends for s, n in _spans(feed, 2)]
    unknown = sum(int((b["targets"] != -100).sum(1).lt(b["lengths"]).sum()) for b in cut)
    assert unknown == sum(lasts)  # only behind a document's last token is there no target


def test_micro_batches_of_similar_length_waste_less_than_those_in_order(scored: TokenStore) -> None:
    job = {**SMALL, "train": {**SMALL["train"], "sequence_length": 400, "global_batch_size": 40}}  # type: ignore[dict-item]
    feed = TokenBatches(JobSpec.model_validate(job), scored, torch.device("cpu"))
    in_order, bucketed = (feed.step(0, 0, 1, s) for s in (MicroBatchSize(rows=4), MicroBatchSize(tokens=1600)))
    assert 0 < bucketed.padding < in_order.padding / 2 and sum(bucketed.tokens) == sum(in_order.tokens)
    assert max(bucketed.padded_tokens) <= 1600


def test_the_share_of_a_rank_is_counted_in_tokens(scored: TokenStore) -> None:
    feed = TokenBatches(JobSpec.model_validate(SMALL), scored, torch.device("cpu"))
    parts = [feed.step(1, rank, 3, MicroBatchSize(rows=2)) for rank in range(3)]
    assert sum(part.share for part in parts) == pytest.approx(parts[0].num_micro_batches)
    packed = [_feed(scored).step(1, rank, 3, SIZE).share for rank in range(3)]
    assert packed == [2, 2, 1]


def test_validation_by_document_reads_the_first_ones(scored: TokenStore) -> None:
    feed = TokenBatches(JobSpec.model_validate(SMALL), scored, torch.device("cpu"))
    lengths_B = [s.batch["lengths"] for s in feed.validation(0, 1, SIZE).micro_batches]
    found = torch.cat([b for b in lengths_B if b is not None]).tolist()
    index_D = scored.index("validation")
    wanted = [min(24, int(d["length"]) - n) for d in index_D for n in range(0, int(d["length"]), 24)]
    assert found == wanted[:7]
