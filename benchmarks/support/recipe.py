"""The parts of a recipe for training with little computation, and the jobs of models that are trained with some of them
for an equal number of operations.

A dense model and a mixture of one width multiply a token by as many weights: two experts of half the inner width of the
dense MLP. The mixture has more of them in each layer but the first.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.model.factory import catalogue
from orchestrator.policy.estimate.flops import ModelSize, size_of
from orchestrator.spec.data import DataSpec
from orchestrator.spec.job import JobSpec

LAYERS, HEADS, KV_HEADS = 4, 4, 2
LENGTH = 128  # tokens of a row
TOP_K = 2
SHORT_ROWS = (64, 0.3)  # tokens of a row at first, and the share of the tokens that are in such rows
SIGNAL = "length"  # stages need a measure of difficulty; they admit everything
COMPRESSED = {"compression": "int8", "tokens": "bf16"}


@dataclass(frozen=True)
class Recipe:
    """What a model is trained with.

    Args:
        num_experts: of each layer but the first; 1: the model is dense.
        in_pieces: the order of a curriculum: pieces of documents, each drawn by itself, lie back to back. Else rows are
            of consecutive tokens, and whole rows are drawn.
        grows_rows: the first rows are short, which needs that order.
        balances: the bias of experts follows their load.
        compresses: gradients travel in int8, and tokens in bf16.
        packs: documents lie back to back in rows of one length, else each has rows of its own.
    """

    num_experts: int = 1
    in_pieces: bool = False
    grows_rows: bool = False
    balances: bool = True
    compresses: bool = False
    packs: bool = True

    @property
    def is_dense(self) -> bool:
        return self.num_experts == 1


@dataclass(frozen=True)
class Setting:
    """What is tuned.

    Args:
        rows: of an update.
        lr: learning rate at its highest.
        width: hidden size; the MLP's inner width is three times as large.
    """

    rows: int
    lr: float
    width: int


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus.

    Args:
        data: as jobs name it.
        vocab_size: its tokens.
        tokens_per_row: the mean where each document has rows of its own, of at most `LENGTH` tokens.
    """

    data: DataSpec
    vocab_size: int
    tokens_per_row: float


def job_of(recipe: Recipe, setting: Setting, seed: int, flops: float, corpus: Corpus) -> JobSpec:
    """The job whose steps take about so many operations."""
    given = _given(recipe, setting, seed, corpus.data)
    per_token = _per_token(size_of_model(JobSpec.model_validate(given), corpus.vocab_size))
    spans = _spans(recipe)
    tokens = flops / sum(share * per_token[length] for length, share in spans)
    in_row = {length: length * (1.0 if recipe.packs else corpus.tokens_per_row / LENGTH) for length, _ in spans}
    steps = [max(1, round(share * tokens / (setting.rows * in_row[length]))) for length, share in spans]
    given["train"] |= {"max_steps": sum(steps)}
    given["train"]["lr_scheduler"] |= {"warmup_steps": max(1, sum(steps) // 10)}
    if recipe.in_pieces:
        short = {"name": "short", "sequence_length": SHORT_ROWS[0], "until": {"steps": steps[0]}}
        stages = [short] if recipe.grows_rows else []
        given["curriculum"] = {"signal": SIGNAL, "stages": [*stages, {"name": "long"}]}
    return JobSpec.model_validate(given)


def size_of_model(job: JobSpec, vocab_size: int) -> ModelSize:
    """Weights by which a token is multiplied, and those of all."""
    return size_of(job, catalogue(job.model, job.num_outputs(vocab_size))[0])


def _given(recipe: Recipe, setting: Setting, seed: int, data: DataSpec) -> dict[str, Any]:
    width, rows = setting.width, setting.rows
    layers: Mapping[str, Any] = {"first_k_dense_replace": LAYERS}
    if not recipe.is_dense:
        layers = {
            "first_k_dense_replace": 1,
            "n_routed_experts": recipe.num_experts,
            "num_experts_per_tok": TOP_K,
            "moe_intermediate_size": 3 * width // TOP_K,
            "n_shared_experts": 0,
        }
        layers = layers if recipe.balances else {**layers, "bias_update_speed": 0.0}
    return {
        "name": "compute-to-target",
        "model": {
            "hidden_size": width,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "intermediate_size": 3 * width,
            **layers,
        },
        "train": {
            "global_batch_size": rows,
            "micro_batch_size": rows // 2,  # a micro-batch on each of two workers
            "sequence_length": LENGTH,
            "lr": setting.lr,
            "lr_scheduler": {"kind": "cosine", "final_fraction": 0.1},
            "seed": seed,
        },
        "data": {
            **data.model_dump(mode="json", exclude_unset=True),
            "row_format": "packed" if recipe.packs else "documents",
        },
        "communication": COMPRESSED if recipe.compresses else {},
        "protection": {"every": "none"},
    }


def _spans(recipe: Recipe) -> list[tuple[int, float]]:
    """Lengths of rows one after the other, with the share of the tokens in such rows."""
    short, share = SHORT_ROWS
    return [(short, share), (LENGTH, 1.0 - share)] if recipe.grows_rows else [(LENGTH, 1.0)]


def _per_token(size: ModelSize) -> dict[int, float]:
    """Operations per token by the length of its row."""
    assert size.attention is not None
    return {length: 6.0 * size.active_parameters + 12.0 * size.attention * length for length in (SHORT_ROWS[0], LENGTH)}
