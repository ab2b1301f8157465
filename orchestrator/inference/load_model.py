"""Loading of a whole model from a checkpoint, without its optimizer state."""

from collections.abc import Mapping
from pathlib import Path

import torch

from orchestrator.checkpoint.hf.export import INTEGERS
from orchestrator.checkpoint.hf.pretrained import check_base, open_pretrained
from orchestrator.checkpoint.read import CheckpointReader, read_manifest
from orchestrator.elastic.state_spec import BUFFER, MASTER, average_of
from orchestrator.errors import CheckpointCorrupt
from orchestrator.inference.int_model import as_rounded_in_training, formats_of, use_integers
from orchestrator.inference.pruned_model import without_pruned_units
from orchestrator.model.base import TrainableModel
from orchestrator.model.factory import build_model, single_rank
from orchestrator.model.linear.fake_quant import use_fake_quantization
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.job import JobSpec
from orchestrator.state.pretrained_weights import read_weights
from orchestrator.state.ranges import NamedRanges
from orchestrator.storage.backends.location import Location


@torch.no_grad()
def load_model(
    checkpoint: Location,
    job: JobSpec,
    prepared: int,
    of_ema: bool = False,
    device: torch.device | None = None,
    precision: str = "fp32",
) -> TrainableModel:
    """The whole model, without neurons and heads that were pruned: its `spec` tells the sizes that are left.

    Args:
        prepared: tokens of the tokenizer, or classes of the data.
        of_ema: the average of the weights in place of the weights.
        device: None: a GPU if there is one.
        precision: of its weights, fp32 or bf16; int8 or int4: its matrices are integers. With fp32 and bf16, a model
            that was trained for integers rounds as it did in training.

    Raises:
        UsageError: these integers aren't for this run.
        CheckpointCorrupt: it can't be read, or belongs to another model or tokenizer.
        EntrypointError: the user's own model can't be built any more.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    experts = read_manifest(checkpoint).experts
    job = job if experts is None else job.with_experts(experts.num_experts)
    with device:
        model = in_precision(
            build_model(job.model, job.num_outputs(prepared), single_rank(job.model, experts)), precision
        )
    tensors: dict[str, torch.Tensor] = {f"{MASTER}/{name}": p for name, p in model.named_parameters()}
    tensors |= {f"{BUFFER}/{name}": b for name, b in model.state_buffers()}
    with CheckpointReader(checkpoint) as reader:
        if job.model.lora is not None:
            base = {name: t for name, t in tensors.items() if name not in reader.manifest.tensors}
            _read_base(job, base)
            tensors = {name: t for name, t in tensors.items() if name not in base}
        if of_ema:
            averages = {average_of(name): tensor for name, tensor in tensors.items()}
            tensors = {name: t for name, t in averages.items() if name in reader.manifest.tensors} | {
                name: t for name, t in tensors.items() if average_of(name) not in reader.manifest.tensors
            }
        for name, tensor in tensors.items():
            entry = reader.manifest.tensors.get(name)
            if entry is None or entry.shape != tuple(tensor.shape):
                found = "lacks it" if entry is None else f"has {entry.shape}"
                raise CheckpointCorrupt(
                    f"{checkpoint} is of another model or tokenizer: job and tokenizer of its run make {name} "
                    f"{tuple(tensor.shape)}, it {found}",
                    remedy="Ask the run that wrote it.",
                )
        flat = [tensor.view(-1) for tensor in tensors.values()]
        for index, start, values in reader.read_all((name, 0, tensor.numel()) for name, tensor in tensors.items()):
            flat[index][start : start + len(values)].copy_(torch.from_numpy(values))
    if isinstance(model, MoELanguageModel) and job.model.is_native and job.train.prunes_units:
        model = without_pruned_units(model, single_rank(job.model, experts))
    if precision in INTEGERS:
        formats = formats_of(job, model, precision)
        assert isinstance(model, MoELanguageModel)
        as_rounded_in_training(model, job)
        use_integers(model, formats)
    elif job.train.quantization is not None:
        use_fake_quantization(model, job.train.quantization)
    return model.eval()


def _read_base(job: JobSpec, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill the weights beside which adapters were trained."""
    assert job.model.init_from is not None
    check_base(job.model)
    ranges = NamedRanges()
    for name, tensor in tensors.items():
        ranges.add(name, 0, tensor.view(-1))
    read_weights(open_pretrained(Path(job.model.init_from)), ranges)


def in_precision(model: TrainableModel, precision: str) -> TrainableModel:
    """The model with weights in a precision of training; buffers keep their dtype, as in the engine."""
    if precision == "bf16":
        for param in model.parameters():
            param.data = param.data.bfloat16()
    return model
