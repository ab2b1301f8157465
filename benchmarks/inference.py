"""Models of integers: their files, their speed, and what training for them is worth.

    python -m benchmarks.inference [--quick]

`size` compares the exported file with one in fp32: over the quantized matrices, and as a whole. `speed` is that of a
mixture of experts of 183 million parameters with random weights: `prefill`, a batch of prompts of 64 tokens, and
`decode`, a token after each, in fp32, bf16, int8 and int4 (groups of 32); arms alternate, and ratios are those of a
round. `without VNNI` is int8 in a process whose oneDNN may not use these instructions. Nothing is compiled.

`loss` is that of SmolLM2-135M (`benchmarks.support.smollm2`) on held-out files of Python's own library, on which it is
trained in full precision, and then rounded to integers (post-training), or with their rounding (quantization-aware),
both computed by integer products, embeddings and output matrix in int8. The gap is to full precision, of the same seed.
(Of a model that is trained from random weights on so few tokens, four bits leave a gap of 0.002 nats, which is noise.)

Runs are kept in a file, so it may be stopped, and goes on where it was. About 25 minutes on two cores.
"""

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Result, alternate, at_least, at_most, mean_interval, median_interval, ratios, run, say
from benchmarks.support.data import data_spec, stores_dir
from benchmarks.support.local_training import KeptResults, train, validation_loss
from benchmarks.support.smollm2 import smollm2
from orchestrator.checkpoint.hf.export import write_model
from orchestrator.checkpoint.hf.pretrained import open_pretrained, resolved
from orchestrator.checkpoint.hf.tensor_listing import list_tensors
from orchestrator.data.prepare.job_store import prepare
from orchestrator.data.store import TokenStore
from orchestrator.elastic.state_spec import PARAM
from orchestrator.inference.int_export import IntFormat
from orchestrator.inference.int_model import use_integers
from orchestrator.inference.load_model import in_precision
from orchestrator.inference.process import merged
from orchestrator.model.attention.kv_cache import KVCache
from orchestrator.model.factory import build_model, single_rank
from orchestrator.model.linear.fake_quant import use_fake_quantization
from orchestrator.model.tasks.language_modeling import LanguageModeling
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.job import JobSpec
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.quantization import QuantizationSpec
from orchestrator.state.pretrained_weights import read_weights
from orchestrator.state.ranges import NamedRanges
from tests.support.pretrained import SPEC, write_weights

FORMATS: dict[str, dict[str, Any]] = {"int8": {}, "int4": {"weight_dtype": "int4", "group_size": 32}}
LARGE = ModelSpec(
    vocab_size=8192,
    hidden_size=1024,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=64,
    intermediate_size=2816,
    first_k_dense_replace=1,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=704,
    n_shared_experts=1,
)
SHORT = {"hidden_size": 128, "num_hidden_layers": 2, "moe_intermediate_size": 64, "intermediate_size": 256}
BATCHES, QUICK_BATCHES = (1, 4, 8, 16, 32), (1, 2)
PROMPT, DECODED, ROUNDS, QUICK_ROUNDS = 64, 8, 7, 2
NO_VNNI = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
MOST_OF_MATRICES, MOST_OF_FILE, LEAST_FASTER, MOST_OF_GAP = 0.26, 0.30, 2.0, 0.5

SEEDS, QUICK_SEEDS = 3, 1
STEPS, QUICK_STEPS = 30, 3
ROWS, LENGTH, VALIDATION_ROWS, LR = 4, 128, 32, 5e-5  # as benchmarks.lora has them
ROUNDED: dict[str, dict[str, Any]] = {
    "int4 in groups": {"weight_dtype": "int4", "group_size": 32},
    "int4": {"weight_dtype": "int4"},
    "int8": {},
}
TRAINED_FOR = ("int4 in groups",)
SOURCES = (
    "model",
    "sampling",
    "spec/train.py",
    "spec/optimizer.py",
    "spec/quantization.py",
    "inference",
)


def measure(quick: bool) -> Result:
    seeds, steps = (QUICK_SEEDS, QUICK_STEPS) if quick else (SEEDS, STEPS)
    spec = LARGE.model_copy(update=SHORT) if quick else LARGE
    with tempfile.TemporaryDirectory(prefix="inference-") as folder:
        workspace = Path(folder)
        stores = stores_dir(quick, workspace)
        base = write_weights(workspace / "base", SPEC) if quick else smollm2(stores)
        store = prepare(data_spec(quick, workspace).source, 1024, 0.1, stores, tokenizer=base / "tokenizer.json")
        kept = KeptResults(stores, Path(__file__), f"{steps} {store.digest}", SOURCES)
        losses = [kept.of(f"seed {seed}", partial(_losses, seed, steps, base, store)) for seed in range(seeds)]
        sizes = _sizes(spec, workspace)
    batches, rounds = (QUICK_BATCHES, QUICK_ROUNDS) if quick else (BATCHES, ROUNDS)
    speed = _speeds(spec, batches, rounds, ("fp32", "bf16", *FORMATS))
    plain = json.loads(
        subprocess.run(
            [sys.executable, "-m", "benchmarks.inference", "--arm", str(int(quick))],
            env=os.environ | NO_VNNI,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()[-1]
    )
    gaps = {kind: [of_seed[kind] - of_seed["full"] for of_seed in losses] for kind in losses[0] if kind != "full"}
    shares = {name: ratios(gaps[f"trained {name}"], gaps[f"rounded {name}"]) for name in TRAINED_FOR}
    intervals = {name: mean_interval(each) if seeds > 1 else each[0] for name, each in shares.items()}
    metrics = {
        "parameters": sum(p.numel() for p in _random(spec).parameters()),
        "size": sizes,
        "speed": speed,
        "without VNNI": plain,
        "losses": losses,
        "gap": gaps,
        "gap of training over rounding": intervals,
    }
    bars = [
        at_most("int8 over fp32, matrices", MOST_OF_MATRICES, sizes["int8"]["matrices"]),
        at_most("int8 over fp32, file", MOST_OF_FILE, sizes["int8"]["file"]),
        *(
            at_least(f"{what} at batch {batch}, int8 over fp32", LEAST_FASTER, speed[what][str(batch)]["int8"])
            for what in ("prefill", "decode")
            for batch in batches
        ),
        *(at_most(f"gap of {name}, trained over rounded", MOST_OF_GAP, intervals[name]) for name in TRAINED_FOR),
    ]
    settings = {"quick": quick, "steps": steps, "prompt": PROMPT, "batches": batches, "lr": LR}
    return Result("inference", 0, settings, seeds, metrics, bars=tuple(bars))


# -- size and speed ----------------------------------------------------------------------------------------------------


def _random(spec: ModelSpec) -> MoELanguageModel:
    assert spec.vocab_size is not None
    model = build_model(spec, spec.vocab_size, single_rank(spec))
    assert isinstance(model, MoELanguageModel)
    model.init_weights(0)
    return model.eval()


def _sizes(spec: ModelSpec, workspace: Path) -> dict[str, dict[str, float]]:
    """Bytes over those in fp32: of the matrices that are quantized with their scales, and of the files."""
    job = JobSpec.model_validate({"name": "inference", "model": spec.model_dump(exclude_unset=True)})
    found: dict[str, int] = {}
    of_matrices: dict[str, int] = {}
    for name in ("fp32", *FORMATS):
        encoding = None if name == "fp32" else IntFormat(QuantizationSpec.model_validate(FORMATS[name]))
        directory = workspace / name
        directory.mkdir()
        assert spec.vocab_size is not None
        found[name] = write_model(merged(_random(spec)), job, spec.vocab_size, "fp32", directory, encoding)
        listing = list_tensors(directory)
        widths = {"F32": 4, "I32": 4, "I8": 1, "I64": 8}
        of_matrices[name] = sum(
            widths[listing.dtypes[tensor]] * torch.Size(shape).numel()
            for tensor, shape in listing.shapes.items()
            if "_proj." in tensor
        )
    return {
        name: {"matrices": of_matrices[name] / of_matrices["fp32"], "file": found[name] / found["fp32"]}
        for name in FORMATS
    }


def _in(dtype: str, spec: ModelSpec) -> MoELanguageModel:
    model = _random(spec)
    if dtype in FORMATS:
        use_integers(model, QuantizationSpec.model_validate(FORMATS[dtype]))
        return model
    in_precision(model, dtype)
    return model


def _speeds(spec: ModelSpec, batches: tuple[int, ...], rounds: int, dtypes: tuple[str, ...]) -> dict[str, Any]:
    """Milliseconds of each format, and how often as fast as the first one it is: by what is computed, and batch."""
    models = {dtype: _in(dtype, spec) for dtype in dtypes}
    caches = torch.empty(1, dtype=torch.bfloat16) if "bf16" in models else None
    speed: dict[str, Any] = {"prefill": {}, "decode": {}}
    for batch in batches:
        ids = torch.randint(0, len(models[dtypes[0]].head), (batch, PROMPT), generator=torch.Generator().manual_seed(0))
        arms = {
            dtype: partial(_timed, model, ids, caches if dtype == "bf16" else None) for dtype, model in models.items()
        }
        measured = alternate(arms, rounds)
        for number, what in enumerate(speed):
            of_arms = {dtype: [each[number] for each in pairs[1:]] for dtype, pairs in measured.items()}
            of_arms |= {f"{dtype} ms": 1e3 * median(of_arms[dtype]) for dtype in dtypes}
            first = of_arms[dtypes[0]]
            for dtype in dtypes[1:]:
                faster = ratios(first, of_arms[dtype])
                of_arms[dtype] = median_interval(faster) if len(faster) > 1 else faster[0]
            del of_arms[dtypes[0]]
            speed[what][str(batch)] = of_arms
        say(f"batch {batch}: {[(what, speed[what][str(batch)]) for what in speed]}")
    return speed


@torch.no_grad()
def _timed(model: MoELanguageModel, ids_BT: Tensor, like: Tensor | None) -> tuple[float, float]:
    """Seconds of the prompts, and of a token after them."""
    cache_of = KVCache(model.spec, len(ids_BT), PROMPT + DECODED, model.head if like is None else like)
    began_s = time.perf_counter()
    model.extend(ids_BT, cache_of)
    prefilled_s = time.perf_counter()
    for _ in range(DECODED):
        model.extend(ids_BT[:, :1], cache_of)
    return prefilled_s - began_s, (time.perf_counter() - prefilled_s) / DECODED


# -- loss --------------------------------------------------------------------------------------------------------------


def _job(name: str | None, base: Path, seed: int, steps: int) -> JobSpec:
    options: dict[str, Any] = {
        "global_batch_size": ROWS,
        "micro_batch_size": ROWS,
        "sequence_length": LENGTH,
        "max_steps": steps,
        "lr": LR,
        "seed": seed,
        "lr_scheduler": {"kind": "linear", "warmup_steps": steps // 10},
        "optimizer": {"weight_decay": 0.0},
    }
    if name is not None:
        options["quantization"] = ROUNDED[name]
    model = resolved(ModelSpec(init_from=str(base)), base).model_dump(exclude_unset=True)
    return JobSpec.model_validate({"name": "inference", "model": model, "train": options})


def _losses(seed: int, steps: int, base: Path, store: TokenStore) -> Mapping[str, float]:
    """Of the model that is trained in full precision, of its integers, and of those of one that is trained for them."""
    task = LanguageModeling()

    def loss_of(model: MoELanguageModel, name: str | None) -> float:
        if name is not None:
            use_integers(model, QuantizationSpec.model_validate(ROUNDED[name]))
        return validation_loss(model, task, _job(None, base, seed, steps), store, VALIDATION_ROWS)

    def trained(name: str | None) -> MoELanguageModel:
        job = _job(name, base, seed, steps)
        model = build_model(job.model, job.num_outputs(), single_rank(job.model))
        assert isinstance(model, MoELanguageModel)
        ranges = NamedRanges()
        for param_name, param in model.named_parameters():
            ranges.add(f"{PARAM}/{param_name}", 0, param.detach().view(-1))
        read_weights(open_pretrained(base), ranges)
        if job.train.quantization is not None:
            use_fake_quantization(model, job.train.quantization)
        train(model, task, job, store)
        return model

    full = trained(None)
    found = {"full": loss_of(full, None)}
    for name in ROUNDED:
        found[f"rounded {name}"] = loss_of(copy.deepcopy(full), name)
    for name in TRAINED_FOR:
        found[f"trained {name}"] = loss_of(trained(name), name)
    return found


def _arm() -> None:
    """Int8 alone, in this process."""
    quick = bool(int(sys.argv[2]))
    spec = LARGE.model_copy(update=SHORT) if quick else LARGE
    batches, rounds = (QUICK_BATCHES, QUICK_ROUNDS) if quick else (BATCHES, ROUNDS)
    print(json.dumps(_speeds(spec, batches, rounds, ("fp32", "int8")), default=vars))


if __name__ == "__main__":
    if "--arm" in sys.argv:
        _arm()
    else:
        run(__doc__, measure)
