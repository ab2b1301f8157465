"""One rank of a world that replays steps of a run: a process that reads its order from stdin and answers by a pipe.

    python -m orchestrator.worker.replay.replay_rank FD < order.json

`orchestrator.submission.verification` starts one per rank. It needs run storage and the token store, no Ray.
"""

import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace

from orchestrator.code_package import placed
from orchestrator.comm.transport.rendezvous import RendezvousServer
from orchestrator.engine.numerics import fingerprint, pin
from orchestrator.engine.threads import compute_here
from orchestrator.errors import OrchestratorError
from orchestrator.model.tasks.all_tasks import task_of
from orchestrator.protocol.child_process import PEER_LOST, REPLAY_LINES, Fault, Numerics, ReplayOrder, answering
from orchestrator.protocol.messages import StoreAddress
from orchestrator.protocol.step_record import StepRecord
from orchestrator.requirements import use_requirements
from orchestrator.secrets import redacted, take_secrets
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import location_of
from orchestrator.worker.replay.replay import replay
from orchestrator.worker.runtime.device import device_of
from orchestrator.worker.runtime.errors import kind_of
from orchestrator.worker.shard.shard import ShardFactory
from orchestrator.worker.step.open_batches import open_batches
from orchestrator.worker.transition.prepared_transition import prepare
from orchestrator.worker.transition.warmup import use_compiler, warm_up
from orchestrator.worker.whole_models.training_task import training_task


def answers(order: ReplayOrder) -> Iterator[Numerics | StoreAddress | StepRecord]:
    """Yield the store's address, if it is created here; the numerics; then the record of each step."""
    spec, plan = JobSpec.model_validate_json(order.job.job_json), order.plan
    if not plan.store_address.port:
        server = RendezvousServer(plan.store_address.host)
        plan = replace(plan, store_address=StoreAddress(*server.address()))
        yield plan.store_address
    compute_here(order.job.threads)
    take_secrets(spec.secrets)
    use_requirements(spec.pip)
    spec = placed(spec, location_of(order.job.storage_dir))
    device = device_of(spec.resources.num_gpus)
    pin(device)
    compiler = use_compiler(spec, device) if spec.train.torch_compile else ""
    yield Numerics(fingerprint(device, spec.model.libraries, spec.code, compiler))
    factory = ShardFactory(order.worker, order.job, spec, task_of(spec.task, spec.data_format), device)
    factory.task = training_task(spec, factory.task, factory.vocab_size, device)
    if spec.train.torch_compile:
        warm_up(spec, factory.vocab_size, device, factory.address)
    feed = open_batches(spec, order.job.store_dir, factory.task, device)
    yield from replay(factory, feed, prepare(factory, plan), order.last_step)


def main() -> None:
    """Read the order, write the answers. All ranks have the same records, so only the first one writes."""
    with answering(REPLAY_LINES) as (order, send):
        is_first = order.plan.world.rank_of(order.worker) == 0
        try:
            for answer in answers(order):
                if is_first:
                    send(answer)
        except OrchestratorError as error:
            send(Fault.of(error, redacted))
        except Exception as error:
            print(redacted(traceback.format_exc()), file=sys.stderr)
            kind = PEER_LOST if kind_of(error) == "peer_lost" else "OrchestratorError"
            send(Fault(kind, redacted(f"{type(error).__name__}: {error}"), "", ""))


if __name__ == "__main__":
    main()
