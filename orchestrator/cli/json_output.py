"""The types of what each verb prints with `-o json`, for `docs/command-line.md` and tests."""

from dataclasses import dataclass
from typing import Any

from orchestrator.cli.terminal.answers import (
    AdoptedRun,
    ChangedPriority,
    EvaluatedModel,
    ExportedModel,
    GeneratedText,
    KilledWorker,
    ListedCheckpoint,
    NamedCheckpoint,
    NamedRun,
    PreparedStore,
    RemovedRun,
    ReplayedSteps,
    RequestedState,
)
from orchestrator.cluster.doctor import Finding
from orchestrator.cluster.local import ClusterRecord
from orchestrator.policy.estimate.job_plan import JobPlan
from orchestrator.policy.report.report import RunReport
from orchestrator.protocol.status import RunStatus
from orchestrator.run_records.run_logs import LogLine
from orchestrator.sampling.sample_ledger import AuditResult
from orchestrator.spec.job import JobSpec


@dataclass(frozen=True)
class JsonOutput:
    """What a verb prints with `-o json`.

    Args:
        type: of the value, or of each one of several.
        form: how they are printed: one value, a list, or lines of one value each.
        also: form under other options.
    """

    type: Any
    form: str = "object"
    also: str = ""


OUTPUTS = {
    "demo": JsonOutput(RunStatus),
    "doctor": JsonOutput(Finding, "list"),
    "run": JsonOutput(RunStatus, "object", "-d: a `NamedRun`"),
    "submit": JsonOutput(NamedRun),
    "ls": JsonOutput(RunStatus, "list", "--watch: a line per change"),
    "status": JsonOutput(RunStatus, "object", "--watch: a line per change"),
    "wait": JsonOutput(RunStatus),
    "logs": JsonOutput(LogLine, "lines"),
    "events": JsonOutput(dict, "list", "-f: a line per event"),
    "report": JsonOutput(RunReport, "object", "of two runs a list"),
    "scale": JsonOutput(RequestedState),
    "pause": JsonOutput(RequestedState),
    "resume": JsonOutput(NamedRun),
    "stop": JsonOutput(RequestedState),
    "rm": JsonOutput(RemovedRun),
    "set": JsonOutput(ChangedPriority),
    "job validate": JsonOutput(JobSpec),
    "job plan": JsonOutput(JobPlan),
    "checkpoint ls": JsonOutput(ListedCheckpoint, "list"),
    "checkpoint now": JsonOutput(NamedCheckpoint),
    "checkpoint verify": JsonOutput(NamedCheckpoint),
    "checkpoint adopt": JsonOutput(AdoptedRun),
    "checkpoint rm": JsonOutput(NamedCheckpoint),
    "model export": JsonOutput(ExportedModel),
    "model eval": JsonOutput(EvaluatedModel),
    "model generate": JsonOutput(GeneratedText),
    "data prepare": JsonOutput(PreparedStore),
    "check data": JsonOutput(AuditResult),
    "check replay": JsonOutput(ReplayedSteps),
    "fault kill-worker": JsonOutput(KilledWorker),
    "curriculum set": JsonOutput(RequestedState),
    "cluster up": JsonOutput(ClusterRecord),
    "cluster status": JsonOutput(ClusterRecord),
}
