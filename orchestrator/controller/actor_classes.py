"""The classes that a run's hosts hold, by dotted name. Tests put torch-free ones in their place."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ActorClasses:
    worker: str = "orchestrator.worker.actor:Worker"
    rendezvous: str = "orchestrator.comm.transport.rendezvous:RendezvousServer"
    tracker: str = "orchestrator.tracking.tracker:Tracker"
    preparation: str = "orchestrator.run_records.data_preparation:Preparation"
