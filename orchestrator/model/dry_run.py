"""Dry run of a user's own model: build it, and run one forward and backward pass on a row and one on no rows.

    python -m orchestrator.model.dry_run < job.json      # writes a line of JSON: null, or the fault

Workers run it while they warm up. `orchestrator.submission.user_code` runs the command above at submission, so that
mistakes are reported at once.

Shape legend: B = rows, T = tokens in a row.
"""

import json
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.errors import EntrypointError
from orchestrator.model.base import TrainableModel, seed_draws
from orchestrator.model.factory import build_model, catalogue, single_rank
from orchestrator.model.user_entrypoint import calling_user
from orchestrator.model.user_rules import shown
from orchestrator.spec.job import JobSpec

MAX_ELEMENTS = 200_000_000  # dense ones; larger models aren't built where the job is submitted, possibly a laptop


def rehearse(job: JobSpec, vocab_size: int, device: torch.device) -> None:
    """Run a user's model without an update, in a world of one and with as few experts as routing needs.

    Raises:
        EntrypointError: it can't be trained.
    """
    few = {"n_routed_experts": job.model.num_experts_per_tok, "n_group": 1, "topk_group": 1}
    spec = job.model.model_copy(update=few)
    with device:
        model = build_model(spec, vocab_size, single_rank(spec))
    model.init_weights(job.train.seed)
    if job.train.precision == "bf16":
        for param in model.parameters():  # buffers keep their dtype, as in the engine
            param.data = param.data.bfloat16()
    for num_rows in (1, 0):
        tokens_BT = torch.zeros(num_rows, job.train.sequence_length, dtype=torch.int64, device=device)
        documents_BT = tokens_BT if job.data.isolate_documents else None
        before = {name: buffer.clone() for name, buffer in model.state_buffers()}
        first = _pass(model, tokens_BT, documents_BT)
        if job.train.is_exact and num_rows:
            _check_buffers(model, before)
            _check_repeats(model, first, _pass(model, tokens_BT, documents_BT))


def _pass(model: TrainableModel, tokens_BT: Tensor, documents_BT: Tensor | None) -> dict[str, Tensor]:
    """Gradients by parameter name, after a forward and backward pass."""
    rows = "a row" if len(tokens_BT) else "no rows"
    try:
        with torch.random.fork_rng(), calling_user(f"a pass of {model.spec.entrypoint} on {rows}"):
            seed_draws(0, 0, 0)
            model(tokens_BT, tokens_BT, documents_BT).backward()
    except EntrypointError as error:
        if not len(tokens_BT):
            error.remedy = (
                "A rank that has no part of the global batch left runs such passes, so that all ranks keep step. Write "
                "sizes out where view or reshape has to guess a -1."
            )
        raise
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and not p.grad.is_sparse}
    without = [name for name, _ in model.named_parameters() if name not in grads]
    model.zero_grad(set_to_none=True)
    if without:
        raise EntrypointError(
            f"parameters {shown(without)} of {model.spec.entrypoint} have no dense gradient after a pass on {rows}",
            remedy="Every parameter must take part in every pass, since ranks add up gradients. Remove unused ones.",
        )
    return grads


def _check_buffers(model: TrainableModel, before: dict[str, Tensor]) -> None:
    changed = [name for name, buffer in model.state_buffers() if not torch.equal(buffer, before[name])]
    if changed:
        raise EntrypointError(
            f"a pass of {model.spec.entrypoint} changes buffers {shown(changed)}, so ranks would have different ones, "
            "and train.determinism is exact",
            remedy="Leave buffers as they are in a pass, or set train.determinism: fast.",
        )


def _check_repeats(model: TrainableModel, first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    differing = [name for name, grad in first.items() if not torch.equal(grad, second[name])]
    if differing:
        raise EntrypointError(
            f"parameters {shown(differing)} of {model.spec.entrypoint} have another gradient in a second pass on the "
            "same row, and train.determinism is exact",
            remedy="Draw random numbers in a pass from torch's own generator, as dropout does, and from no other; use "
            "only deterministic operations; or set train.determinism: fast.",
        )


@dataclass(frozen=True)
class DryRunFault:
    """What is wrong with a model, serialized for the calling process. Fields as in EntrypointError."""

    message: str
    remedy: str
    traceback: str


def fault_of(job: JobSpec) -> DryRunFault | None:
    """The first fault that would keep the job's model from being trained, as far as this process can check."""
    vocab_size = job.model.vocab_size or job.data.vocab_size
    try:
        params, _ = catalogue(job.model, vocab_size)
        if sum(p.numel for p in params if p.expert is None) <= MAX_ELEMENTS:
            rehearse(job, vocab_size, torch.device("cpu"))
    except EntrypointError as error:
        return DryRunFault(error.message, error.remedy, error.traceback)
    return None


def main() -> None:
    job = JobSpec.model_validate_json(sys.stdin.read())
    with redirect_stdout(sys.stderr):  # keep the user code's prints out of the answer
        fault = fault_of(job)
    print(json.dumps(None if fault is None else vars(fault)))


if __name__ == "__main__":
    main()
