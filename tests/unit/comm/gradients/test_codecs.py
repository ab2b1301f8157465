"""What codecs send, what is read from it, and what is left behind."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from orchestrator.comm.gradients.codecs import Codec, TopK, codec_of, warmed_up
from orchestrator.spec.communication import BLOCK, CompressionSpec
from tests.support import devices

pytestmark = pytest.mark.usefixtures("device")

SCHEMES = ("none", "bf16", "fp16", "int8", "int4", "topk")


def _codec(scheme: str) -> Codec:
    return codec_of(CompressionSpec(scheme=scheme), 1_000, 0)  # type: ignore[arg-type]


def _gradients(pieces: int = 3, blocks: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-9, 3, pieces * blocks * BLOCK)[torch.randperm(pieces * blocks * BLOCK, generator=generator)]
    return (torch.randn(pieces * blocks * BLOCK, generator=generator) * scale).view(pieces, -1).to(devices.device())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_sent_and_what_is_left_make_the_whole(scheme: str) -> None:
    codec, x_WS = _codec(scheme), _gradients()
    rest_WS = x_WS.clone()
    payload_WP = codec.take(rest_WS)
    assert torch.equal(payload_WP, codec.encode(x_WS))
    torch.testing.assert_close(codec.decode(payload_WP) + rest_WS, x_WS, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("scheme", "share"), [("bf16", 0.5), ("fp16", 0.504), ("int8", 0.254), ("int4", 0.129), ("topk", 0.05)]
)
def test_a_payload_has_the_declared_size(scheme: str, share: float) -> None:
    x_WS = _gradients()
    payload_WP = _codec(scheme).encode(x_WS)
    assert payload_WP.dtype == torch.uint8
    assert payload_WP.nbytes / x_WS.nbytes == pytest.approx(share, rel=0.01)


@pytest.mark.parametrize(
    ("scheme", "error"), [("bf16", 2**-8), ("fp16", 2**-11), ("int8", 0.5 / 127), ("int4", 0.5 / 7)]
)
def test_rounding_is_within_the_format(scheme: str, error: float) -> None:
    """fp16 and int8 of each block's largest, bf16 of each number."""
    x_WS, codec = _gradients(), _codec(scheme)
    wrong_WS = (codec.decode(codec.encode(x_WS)) - x_WS).abs()
    largest_WS = x_WS.abs()
    if scheme != "bf16":
        largest_WS = largest_WS.view(3, -1, BLOCK).amax(-1, keepdim=True).expand(-1, -1, BLOCK).reshape(3, -1)
    assert (wrong_WS <= 1.001 * error * largest_WS).all()


def test_topk_keeps_the_largest_of_each_block() -> None:
    x_WS = _gradients()
    kept = TopK(7).decode(TopK(7).encode(x_WS)).view(-1, BLOCK) != 0
    magnitude = x_WS.abs().view(-1, BLOCK)
    assert (kept.sum(-1) == 7).all()
    for block, chosen in zip(magnitude, kept, strict=True):
        assert block[chosen].min() >= block[~chosen].max()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_sums_are_those_of_what_is_read(scheme: str) -> None:
    codec = _codec(scheme)
    payload_WP = torch.cat([codec.encode(_gradients(1, seed=seed)) for seed in range(4)])
    plain = codec.decode(payload_WP)
    wanted = plain[0] + plain[1] + plain[2] + plain[3]
    total_S = torch.zeros_like(wanted)
    for payload_P in payload_WP:
        codec.add(total_S, payload_P)
    assert torch.equal(total_S, wanted)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_at_the_other_end(scheme: str, bad: float) -> None:
    x_WS = _gradients()
    x_WS[1, 300] = bad
    read_WS = _codec(scheme).decode(_codec(scheme).encode(x_WS))
    assert read_WS[[0, 2]].isfinite().all() and not read_WS[1].isfinite().all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_are_zeros(scheme: str) -> None:
    x_WS = torch.zeros(2, BLOCK, device=devices.device())
    assert not _codec(scheme).decode(_codec(scheme).take(x_WS)).any() and not x_WS.any()


def test_the_share_falls_to_what_was_asked_for() -> None:
    compression = CompressionSpec(scheme="topk", share=0.01, warmup_steps=4)
    shares = [warmed_up(compression, number) for number in range(6)]
    assert shares[0] == 0.5 and shares[4:] == [0.01, 0.01]
    factors = [later / earlier for earlier, later in pairwise(shares[:5])]
    assert factors == pytest.approx([factors[0]] * 4)


def test_ranks_send_as_many_bytes_whatever_their_number() -> None:
    compression = CompressionSpec(scheme="topk", share=0.05)
    sent = [compression.kept_per_block(size) * 3 * (size - 1) / size for size in (2, 4, 8, 64, 1024)]
    assert max(sent) < 1.1 * min(sent) and max(sent) <= 0.05 * BLOCK * 4


def test_a_block_has_so_many_elements() -> None:
    with pytest.raises(ValueError, match="can't keep 257 of 256 elements"):
        TopK(257)
