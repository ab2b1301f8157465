"""Classes of a run's hosted actors, by dotted name. Tests substitute torch-free ones."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ActorClasses:
    worker: str = "orchestrator.worker.actor:Worker"
    rendezvous: str = "orchestrator.comm.transport.rendezvous:RendezvousServer"
    tracker: str = "orchestrator.tracking.tracker:Tracker"
    callbacks: str = "orchestrator.callback_process.callback_runner:CallbackRunner"
    preparation: str = "orchestrator.run_records.data_preparation:Preparation"
