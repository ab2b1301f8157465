"""Child process for inference: it reads one request from stdin and writes JSON lines of answers to a pipe.

    python -m orchestrator.inference.process FD < request.json

`orchestrator.submission.model_process` starts it. It needs no engine and no world, and reads weights from the
checkpoint, but no optimizer moments.
"""

import traceback
from collections.abc import Iterator

import torch

from orchestrator.checkpoint.read import CheckpointReader
from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.elastic.state_spec import BUFFER, MASTER
from orchestrator.errors import CheckpointCorrupt, OrchestratorError
from orchestrator.inference.evaluate import evaluate
from orchestrator.inference.generate import generate
from orchestrator.model.base import TrainableModel
from orchestrator.model.factory import build_model, single_rank
from orchestrator.protocol.child_process import MODEL_LINES, Answer, Evaluation, Fault, Request, answering
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import Location, location_of, objects_at


def answers(request: Request) -> Iterator[Answer]:
    """Answers to the request, the result last."""
    run_dir = location_of(request.run_dir)
    job = JobSpec.model_validate_json(objects_at(run_dir).get("job.json"))
    tokenizer = TextTokenizer.load(run_dir / "tokenizer.json")
    model = load_model(location_of(request.checkpoint), job, tokenizer.vocab_size)
    if isinstance(request, Evaluation):
        yield from evaluate(request, job, tokenizer, model)
    else:
        yield from generate(request, job, tokenizer, model)


@torch.no_grad()
def load_model(checkpoint: Location, job: JobSpec, tokenizer_vocab_size: int) -> TrainableModel:
    """The whole model in fp32, on a GPU if there is one.

    Raises:
        CheckpointCorrupt: it can't be read, or belongs to another model or tokenizer.
        EntrypointError: the user's own model can't be built any more.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        model = build_model(job.model, job.model.vocab_size or tokenizer_vocab_size, single_rank(job.model))
    tensors: dict[str, torch.Tensor] = {f"{MASTER}/{name}": p for name, p in model.named_parameters()}
    tensors |= {f"{BUFFER}/{name}": b for name, b in model.state_buffers()}
    with CheckpointReader(checkpoint) as reader:
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
    return model.eval()


def main() -> None:
    """Read one request, write its answers."""
    with answering(MODEL_LINES) as (request, send):
        try:
            for answer in answers(request):
                send(answer)
        except OrchestratorError as error:
            send(Fault.of(error))
        except (torch.OutOfMemoryError, MemoryError):
            traceback.print_exc()
            remedy = "Free memory, or request less."
            send(Fault("OrchestratorError", "the model and the request don't fit in memory", remedy, ""))


if __name__ == "__main__":
    main()
