"""Estimated traffic of compression schemes."""

import pytest

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.state_spec import ParamSpec
from orchestrator.policy.estimate.traffic import gradient_bytes, ranks_visited, sent_share
from orchestrator.spec.communication import CompressionSpec

MATRIX, NORM = ParamSpec("layers.0.attention.query", (64, 256), None), ParamSpec("layers.0.norm", (64,), None)
ROUTERS = [ParamSpec(f"layers.1.{name}.weight", (64, 64), None) for name in ("router", "mlp.gate")]
EXPERT = ParamSpec("layers.1.experts.0.down", (64, 64), 0)


@pytest.mark.parametrize(
    ("scheme", "share"), [("bf16", 0.5), ("fp16", 0.504), ("int8", 0.254), ("int4", 0.129), ("powersgd", 0.039)]
)
def test_a_matrix_shrinks_and_the_rest_stays(scheme: str, share: float) -> None:
    compression = CompressionSpec(scheme=scheme)  # type: ignore[arg-type]
    assert sent_share(MATRIX, compression, 4) == pytest.approx(share, rel=0.01)
    placement = ExpertPlacement(1, 4, ((0, 1),))
    plain = gradient_bytes([MATRIX, NORM, *ROUTERS, EXPERT], placement, CompressionSpec())
    assert plain == 4 * 3 * (MATRIX.numel + NORM.numel + 2 * 64 * 64) + 4 * EXPERT.numel
    sent = gradient_bytes([MATRIX, NORM, *ROUTERS, EXPERT], placement, compression)
    assert plain - sent == pytest.approx(4 * 3 * MATRIX.numel * (1 - share), rel=0.01)


def test_topk_sends_its_share_of_a_whole_copy_at_any_number_of_ranks() -> None:
    compression = CompressionSpec(scheme="topk", share=0.1)
    for size in (2, 4, 8, 64):
        sent = gradient_bytes([MATRIX], ExpertPlacement.balanced(1, size), compression) / size
        assert sent == pytest.approx(0.1 * 4 * MATRIX.numel, rel=0.05)


def _destinations(num_experts: int, world_size: int) -> tuple[int, ...]:
    return ExpertPlacement.balanced(num_experts, world_size).destinations()[0]


def test_a_token_goes_once_to_a_rank_however_many_of_its_experts_are_there() -> None:
    one_each, two_each = _destinations(4, 4), _destinations(8, 4)
    assert ranks_visited(one_each, 0, 2) == pytest.approx(2 * 3 / 4)
    assert ranks_visited(two_each, 0, 2) == pytest.approx(3 * (1 - 15 / 28))
    assert ranks_visited(two_each, 0, 8) == pytest.approx(3)
    assert ranks_visited(_destinations(8, 1), 0, 2) == 0
    assert ranks_visited(_destinations(2, 6), 0, 2) == pytest.approx(1)  # the other expert is elsewhere


def test_a_token_goes_to_no_more_ranks_than_it_may() -> None:
    destinations = _destinations(16, 8)
    visited = [ranks_visited(destinations, 0, 4, limit) for limit in (1, 2, 3, 8, None)]
    assert visited == sorted(visited) and visited[0] == visited[1] <= 2 and visited[3] == visited[4]
    assert ranks_visited(destinations, 0, 1, 1) == pytest.approx(7 / 8)
