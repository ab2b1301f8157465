"""Gradient compression codecs: encode the pieces that a rank sends, and decode the payloads that it receives.

The size of a codec's payload depends on the piece's size alone, so ranks exchange no sizes. A payload decodes to a
non-finite value wherever an input isn't finite, so that all ranks skip the step. What a codec omits or rounds off can
stay in the gradients for error feedback (Seide et al., 2014).

Shape legend: W = pieces, S = elements of a piece, a multiple of `BLOCK`; B = blocks of a piece, K = elements kept of a
block, P = bytes of a piece's payload.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from orchestrator.spec.communication import BLOCK, SPARSE_BYTES, CompressionSpec

WARMUP_SHARE = 0.5  # share of the bytes at the first update


class Codec(ABC):
    """Compresses pieces. Stateless: callers keep residuals and the like."""

    index_share = 0.0  # share of a payload's bytes that are indices

    @abstractmethod
    def encode(self, x_WS: Tensor) -> Tensor:
        """Payloads (W, P), uint8, of gradients in fp32."""

    @abstractmethod
    def decode(self, payload_WP: Tensor) -> Tensor:
        """Decoded payloads (W, S), fp32."""

    def take(self, x_WS: Tensor) -> Tensor:
        """Encode payloads, and leave the compression error in `x_WS`."""
        payload_WP = self.encode(x_WS)
        x_WS.sub_(self.decode(payload_WP))
        return payload_WP

    def clear(self, x_WS: Tensor, payload_WP: Tensor) -> None:
        """Zero the elements that the payloads contain."""
        x_WS.zero_()

    def add(self, total_S: Tensor, payload_P: Tensor) -> None:
        """Add the decoded payload of one piece to `total_S`."""
        total_S.add_(self.decode(payload_P[None])[0])


class Exact(Codec):
    """Unchanged fp32."""

    def encode(self, x_WS: Tensor) -> Tensor:
        return x_WS.clone().view(torch.uint8)

    def decode(self, payload_WP: Tensor) -> Tensor:
        return payload_WP.view(torch.float32)


class Bf16(Codec):
    """bfloat16: half the bytes, 8 bits of mantissa."""

    def encode(self, x_WS: Tensor) -> Tensor:
        return x_WS.to(torch.bfloat16).view(torch.uint8)

    def decode(self, payload_WP: Tensor) -> Tensor:
        return payload_WP.view(torch.bfloat16).float()


class Fp16(Codec):
    """Blocks of fp16, each with its own fp32 scale, so that no value overflows or underflows."""

    LARGEST = 32_768.0

    def encode(self, x_WS: Tensor) -> Tensor:
        scale_WB1, scaled_WBE = _scaled(x_WS, self.LARGEST)
        return _joined(scaled_WBE.to(torch.float16), scale_WB1)

    def decode(self, payload_WP: Tensor) -> Tensor:
        numbers_WBn, scale_WB1 = _parted(payload_WP, 2 * BLOCK)
        return torch.mul(numbers_WBn.view(torch.float16), scale_WB1).view(len(payload_WP), -1)


class Int8(Codec):
    """Blocks of integers from -127 to 127, each with its own fp32 scale."""

    LARGEST, NUM_BYTES = 127, BLOCK  # bytes per block

    def encode(self, x_WS: Tensor) -> Tensor:
        scale_WB1, scaled_WBE = _scaled(x_WS, self.LARGEST)
        return _joined(self._pack(scaled_WBE.round_().to(torch.int8)), scale_WB1)

    def decode(self, payload_WP: Tensor) -> Tensor:
        numbers_WBE, scale_WB1 = self._read(payload_WP)
        return numbers_WBE.mul_(scale_WB1).view(len(payload_WP), -1)

    def take(self, x_WS: Tensor) -> Tensor:
        scale_WB1, numbers_WBE = _scaled(x_WS, self.LARGEST)
        payload_WP = _joined(self._pack(numbers_WBE.round_().to(torch.int8)), scale_WB1)
        x_WS.sub_(numbers_WBE.mul_(scale_WB1).view_as(x_WS))  # equals what `decode` returns
        return payload_WP

    def _read(self, payload_WP: Tensor) -> tuple[Tensor, Tensor]:
        packed_WBn, scale_WB1 = _parted(payload_WP, self.NUM_BYTES)
        return self._unpack(packed_WBn.view(torch.int8)).float(), scale_WB1

    def _pack(self, numbers_WBE: Tensor) -> Tensor:
        return numbers_WBE

    def _unpack(self, packed_WBn: Tensor) -> Tensor:
        return packed_WBn


class Int4(Int8):
    """Integers from -7 to 7, two per byte: one of the block's first half and one of its second."""

    LARGEST, NUM_BYTES = 7, BLOCK // 2

    def _pack(self, numbers_WBE: Tensor) -> Tensor:
        first_WBn, second_WBn = numbers_WBE.chunk(2, -1)
        return (first_WBn & 15).bitwise_or_(second_WBn << 4)

    def _unpack(self, packed_WBn: Tensor) -> Tensor:
        return torch.cat([(packed_WBn << 4) >> 4, packed_WBn >> 4], dim=-1)  # a shift to the right keeps the sign


def _scaled(x_WS: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Scales by block (W, B, 1), and the blocks (W, B, E) scaled so that their largest magnitude is `largest`. Where a
    number isn't finite the scale isn't either, so the number decodes as not finite whatever it is rounded to."""
    x_WBE = x_WS.view(len(x_WS), -1, BLOCK)
    scale_WB1 = x_WBE.abs().amax(-1, keepdim=True).div_(largest)
    return scale_WB1, x_WBE / torch.where(scale_WB1 == 0, 1.0, scale_WB1)


def _joined(numbers_WBn: Tensor, scale_WB1: Tensor) -> Tensor:
    """A payload (W, P): all numbers, then all scales."""
    parts = [part.view(len(scale_WB1), -1).view(torch.uint8) for part in (numbers_WBn, scale_WB1)]
    return torch.cat(parts, dim=1)


def _parted(payload_WP: Tensor, num_bytes: int) -> tuple[Tensor, Tensor]:
    """Split a payload of `_joined` into blocks of `num_bytes` bytes each, and scales."""
    num_blocks = payload_WP.shape[1] // (num_bytes + 4)
    numbers, scales = torch.split(payload_WP, [num_blocks * num_bytes, num_blocks * 4], dim=1)
    scale_WB1 = scales.contiguous().view(torch.float32)[..., None]
    return numbers.contiguous().view(len(payload_WP), num_blocks, num_bytes), scale_WB1


class TopK(Codec):
    """The K largest elements of each block in bf16, with their positions in the block, one byte each.

    Selecting within blocks, as in ScaleCom (Chen et al., 2020), needs short sorts instead of a long one and one-byte
    indices instead of four-byte ones. Each rank's piece has equally many elements, so the cost of a reduce-scatter
    doesn't grow with the number of ranks.
    """

    index_share = 1 / SPARSE_BYTES

    def __init__(self, kept_per_block: int) -> None:
        if not 1 <= kept_per_block <= BLOCK:
            raise ValueError(f"top-k can't keep {kept_per_block} of {BLOCK} elements; choose 1 to {BLOCK}")
        self._kept = kept_per_block

    def encode(self, x_WS: Tensor) -> Tensor:
        return self._encode(x_WS)[0]

    def take(self, x_WS: Tensor) -> Tensor:
        payload_WP, index_WBK, rest_WBK = self._encode(x_WS)
        x_WS.view(len(x_WS), -1, BLOCK).scatter_(-1, index_WBK, rest_WBK)
        return payload_WP

    def clear(self, x_WS: Tensor, payload_WP: Tensor) -> None:
        _, index_WBK = self._parts(payload_WP)
        x_WS.view(len(x_WS), -1, BLOCK).scatter_(-1, index_WBK.long(), 0.0)

    def decode(self, payload_WP: Tensor) -> Tensor:
        value_WBK, index_WBK = self._parts(payload_WP)
        x_WBE = value_WBK.new_zeros(*value_WBK.shape[:2], BLOCK, dtype=torch.float32)
        return x_WBE.scatter_(-1, index_WBK.long(), value_WBK.float()).view(len(payload_WP), -1)

    def add(self, total_S: Tensor, payload_P: Tensor) -> None:
        (value_BK,), (index_BK,) = self._parts(payload_P[None])
        total_S.view(-1, BLOCK).scatter_add_(-1, index_BK.long(), value_BK.float())

    def _encode(self, x_WS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Payloads, the positions of the chosen elements, and their rounding errors."""
        x_WBE = x_WS.view(len(x_WS), -1, BLOCK)
        index_WBK = x_WBE.abs().topk(self._kept, dim=-1, sorted=False).indices  # a NaN counts as the largest
        chosen_WBK = x_WBE.gather(-1, index_WBK)
        value_WBK = chosen_WBK.to(torch.bfloat16)
        parts = [value_WBK.view(torch.uint8).view(len(x_WS), -1), index_WBK.to(torch.uint8).view(len(x_WS), -1)]
        return torch.cat(parts, dim=1), index_WBK, chosen_WBK.sub_(value_WBK)

    def _parts(self, payload_WP: Tensor) -> tuple[Tensor, Tensor]:
        num_values = payload_WP.shape[1] // SPARSE_BYTES
        shape = (len(payload_WP), num_values // self._kept, self._kept)
        value = payload_WP[:, : 2 * num_values].clone(memory_format=torch.contiguous_format).view(torch.bfloat16)
        return value.view(shape), payload_WP[:, 2 * num_values :].reshape(shape)


def codec_of(compression: CompressionSpec, num_ranks: int, num_updates: int, scheme: str | None = None) -> Codec:
    """The codec for the update after `num_updates` updates. Not for `powersgd`, which is no codec.

    Args:
        scheme: the choice of `auto`; None for the job's own scheme.
    """
    match scheme or compression.scheme:
        case "none" | "auto":
            return Exact()
        case "bf16":
            return Bf16()
        case "fp16":
            return Fp16()
        case "int8":
            return Int8()
        case "int4":
            return Int4()
        case "topk":
            return TopK(compression.kept_per_block(num_ranks, warmed_up(compression, num_updates)))
    raise ValueError(f"{compression.scheme} is no codec; none, bf16, fp16, int8, int4 and topk are")


def warmed_up(compression: CompressionSpec, num_updates: int) -> float:
    """The share of bytes after `num_updates` updates: falls geometrically from half to the requested share."""
    if num_updates >= compression.warmup_steps:
        return compression.share
    done = num_updates / compression.warmup_steps
    return float(WARMUP_SHARE * (compression.share / WARMUP_SHARE) ** done)
