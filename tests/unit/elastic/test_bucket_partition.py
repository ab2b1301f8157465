"""Cuts of buckets: every parameter once, pieces of equal length, matrices whole."""

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.elastic.bucket_partition import cut_buckets, piece_multiple
from orchestrator.spec.communication import CommunicationSpec


@given(
    numel=st.lists(st.integers(1, 400), min_size=1, max_size=12),
    num_ranks=st.integers(1, 5),
    size=st.integers(1, 900),
    compressed=st.booleans(),
    is_whole=st.booleans(),
)
def test_every_parameter_has_one_place(
    numel: list[int], num_ranks: int, size: int, compressed: bool, is_whole: bool
) -> None:
    communication = CommunicationSpec(bucket_mb=size * 4 / 2**20)
    cuts = cut_buckets(numel, num_ranks, communication, compressed, is_whole)
    assert sorted(index for cut in cuts for index in cut.members) == list(range(len(numel)))
    assert [min(cut.members) for cut in cuts] == sorted((min(cut.members) for cut in cuts), reverse=True)
    for cut in cuts:
        assert cut.piece % piece_multiple(compressed) == 0
        end = 0
        for index, start in zip(cut.members, cut.starts, strict=True):
            assert start >= end
            assert start == end or is_whole
            end = start + numel[index]
            assert not is_whole or start // cut.piece == (end - 1) // cut.piece
        assert end <= cut.piece * num_ranks


def test_matrices_are_dealt_so_that_pieces_are_about_equal() -> None:
    (cut,) = cut_buckets([160, 80, 80, 160, 80, 80], 2, CommunicationSpec(), compressed=False, is_whole=True)
    assert cut.piece == 320 and cut.members == (0, 1, 4, 2, 3, 5)
    assert cut.starts == (0, 160, 240, 320, 400, 560)
