"""Whole models in one process, beside the shards that are trained: the model that training starts from, as a reference,
and a teacher."""

from pathlib import Path

import torch

from orchestrator.checkpoint.hf.teacher import check_teacher, open_teacher
from orchestrator.elastic.state_spec import BUFFER, PARAM
from orchestrator.inference.load_model import in_precision, load_model
from orchestrator.model.base import TrainableModel
from orchestrator.model.factory import build_model, single_rank
from orchestrator.model.linear.fake_quant import use_fake_quantization
from orchestrator.spec.distill import DistillSpec
from orchestrator.spec.job import JobSpec
from orchestrator.spec.train import TrainSpec
from orchestrator.state.ranges import NamedRanges
from orchestrator.worker.transition.load_state import read_pretrained


def starting_model(job: JobSpec, num_outputs: int, device: torch.device) -> TrainableModel:
    """The whole model with the weights that training starts from, in the precision of training, and with its
    rounding."""
    with device:
        model = build_model(job.model, job.num_outputs(num_outputs), single_rank(job.model))
    model.init_weights(job.train.seed)
    if job.model.init_from is not None:
        _read_pretrained(model)
    if job.train.quantization is not None:
        use_fake_quantization(model, job.train.quantization)
    return in_precision(model, job.train.precision).eval()


def teacher_model(distill: DistillSpec, vocab_size: int, train: TrainSpec, device: torch.device) -> TrainableModel:
    """The teacher in the precision of training, without gradients.

    Args:
        vocab_size: of the student; the teacher has the same.

    Raises:
        UsageError: it is gone, or has changed.
        CheckpointCorrupt: its files can't be read.
    """
    check_teacher(distill)
    teacher = open_teacher(Path(distill.directory))
    if teacher.job is not None:
        model = load_model(Path(distill.directory), teacher.job, vocab_size, device=device, precision=train.precision)
    else:
        with device:
            model = in_precision(build_model(teacher.model, vocab_size, single_rank(teacher.model)), train.precision)
        _read_pretrained(model)
    return model.requires_grad_(False).eval()


def _read_pretrained(model: TrainableModel) -> None:
    """Fill the weights and buffers that `init_from` has."""
    ranges = NamedRanges()
    for name, param in model.named_parameters():
        ranges.add(f"{PARAM}/{name}", 0, param.data.view(-1))
    for name, buffer in model.state_buffers():
        ranges.add(f"{BUFFER}/{name}", 0, buffer.view(-1))
    read_pretrained(model.spec, ranges)
