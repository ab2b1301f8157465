"""The manifest as a value: joining shards, coverage, JSON that notices every change."""

import json
from dataclasses import replace

import pytest

from orchestrator.checkpoint.manifest import (
    CheckpointManifest,
    FileEntry,
    ShardHeader,
    ShardPart,
    TensorEntry,
    checkpoint_name,
    manifest_of,
    parse_checkpoint_name,
)
from orchestrator.errors import CheckpointCorrupt, ProtocolError
from orchestrator.protocol.worker_report import ShardWritten

Shard = tuple[ShardWritten, ShardHeader]


def shard(rank: int, *pieces: tuple[str, int, int]) -> Shard:
    file = f"shard-{rank:05d}.safetensors"
    parts = tuple((name, ShardPart(file, f"{name}[{start}:{stop}]", start, stop)) for name, start, stop in pieces)
    written = ShardWritten(
        step=120,
        generation=2,
        rank=rank,
        file=file,
        num_bytes=8,
        header_sha256="cd" * 32,
        meta_sha256="ef" * 32,
    )
    return written, ShardHeader(parts, {"position": 9} if rank == 0 else None)


def changed(shard: Shard, **changes: object) -> Shard:
    return replace(shard[0], **changes), shard[1]  # type: ignore[arg-type]


def joined(*shards: Shard) -> CheckpointManifest:
    return manifest_of(shards, run_id="r", term=3, shapes={"master/w": (2, 3), "buffer/n": ()})


WHOLE = (shard(1, ("master/w", 2, 6)), shard(0, ("master/w", 0, 2), ("buffer/n", 0, 1)))


def test_shards_of_any_order_make_one_manifest() -> None:
    manifest = joined(*WHOLE)
    assert (manifest.step, manifest.term, manifest.generation, manifest.meta) == (120, 3, 2, {"position": 9})
    assert [(piece.start, piece.stop) for piece in manifest.tensors["master/w"].pieces] == [(0, 2), (2, 6)]
    assert manifest.tensors["buffer/n"].numel == 1
    assert set(manifest.files) == {"shard-00000.safetensors", "shard-00001.safetensors"}
    assert "world" not in manifest.to_json()


@pytest.mark.parametrize(
    ("shards", "rule"),
    [
        pytest.param([shard(0, ("master/w", 0, 6))], "'buffer/n' covered up to element 0 of 1", id="tensor-missing"),
        pytest.param([shard(0, ("master/w", 0, 5), ("buffer/n", 0, 1))], "up to element 5 of 6", id="end-missing"),
        pytest.param(
            [shard(0, ("master/w", 0, 2), ("buffer/n", 0, 1)), shard(1, ("master/w", 3, 6))],
            r"\[2, 3\) are stored nowhere",
            id="gap",
        ),
        pytest.param(
            [shard(0, ("master/w", 0, 4), ("buffer/n", 0, 1)), shard(1, ("master/w", 3, 6))],
            r"\[3, 4\) are stored twice",
            id="overlap",
        ),
        pytest.param([shard(0, ("master/w", 0, 9), ("buffer/n", 0, 1))], "up to element 9 of 6", id="too-long"),
    ],
)
def test_pieces_must_cover_each_tensor_once(shards: list[Shard], rule: str) -> None:
    with pytest.raises(CheckpointCorrupt, match=rule):
        joined(*shards)


@pytest.mark.parametrize(
    ("shards", "rule"),
    [
        pytest.param([], "0 shards disagree", id="none"),
        pytest.param([WHOLE[0], changed(WHOLE[1], step=121)], "disagree", id="two-steps"),
        pytest.param([WHOLE[0], changed(WHOLE[1], generation=3)], "disagree", id="two-generations"),
        pytest.param([WHOLE[0], changed(WHOLE[1], meta_sha256="")], "disagree", id="two-metas"),
        pytest.param([WHOLE[0]], "none of 1 shards holds the state that is not a tensor", id="no-meta"),
        pytest.param([*WHOLE, shard(2, ("master/v", 0, 6))], "no shape is known", id="unknown-tensor"),
        pytest.param([WHOLE[0], changed(WHOLE[1], file=WHOLE[0][0].file)], "the same file", id="one-file-twice"),
    ],
)
def test_shards_must_belong_together(shards: list[Shard], rule: str) -> None:
    with pytest.raises(ProtocolError, match=rule):
        joined(*shards)


def test_json_gives_the_same_manifest_back() -> None:
    manifest = joined(*WHOLE)
    assert CheckpointManifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("[]", id="list"),
        pytest.param('{"manifest": {}}', id="no-digest"),
        pytest.param(joined(*WHOLE).to_json()[:-40], id="cut-short"),
        pytest.param(joined(*WHOLE).to_json().replace('"position": 9', '"position": 8'), id="meta-changed"),
        pytest.param(joined(*WHOLE).to_json().replace('"step": 120', '"step": 121'), id="step-changed"),
    ],
)
def test_json_that_was_changed_is_refused(text: str) -> None:
    with pytest.raises(CheckpointCorrupt):
        CheckpointManifest.from_json(text)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        pytest.param({"format": "orchestrator-checkpoint-v9"}, "this version reads", id="format"),
        pytest.param({"files": {"../../etc/passwd": FileEntry("", 0)}}, "no folder", id="file-outside"),
        pytest.param({"files": {}}, "which is not listed", id="file-not-listed"),
        pytest.param({"tensors": {"t": TensorEntry("bfloat16", (1,), ())}}, "stored are float32", id="dtype"),
        pytest.param(
            {"tensors": {"t": TensorEntry("float32", (0,), (ShardPart(WHOLE[0][0].file, "t", 0, 0),))}},
            "empty piece",
            id="empty-piece",
        ),
    ],
)
def test_a_well_formed_but_wrong_value_is_refused_too(change: dict[str, object], rule: str) -> None:
    lie = replace(joined(*WHOLE), **change)  # its digest is right, its content isn't
    with pytest.raises(CheckpointCorrupt, match=rule):
        CheckpointManifest.from_json(lie.to_json())


def test_a_manifest_with_an_unknown_field_is_refused() -> None:
    outer = json.loads(joined(*WHOLE).to_json())
    outer["manifest"]["world_size"] = 2
    with pytest.raises(CheckpointCorrupt):
        CheckpointManifest.from_json(json.dumps(outer))


@pytest.mark.parametrize("step", [0, 120, 99_999_999, 100_000_000])
def test_directory_names_parse_back(step: int) -> None:
    assert parse_checkpoint_name(checkpoint_name(step, 3, 7)) == (step, 3, 7)
    assert parse_checkpoint_name(f"step-{step:08d}") is None
