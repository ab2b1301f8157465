"""Parameters of a job's model, without torch in this process: control code never imports it."""

import json
from functools import cache

from orchestrator.checkpoint.hf.shapes import listed
from orchestrator.elastic.state_spec import ParamSpec
from orchestrator.errors import UsageError
from orchestrator.policy.estimate.job_plan import JobPlan, plan_job
from orchestrator.policy.estimate.worker_memory import StatePlan
from orchestrator.spec.job import JobSpec
from orchestrator.torch_process import run_module


def plan_of(job: JobSpec) -> JobPlan:
    """The job's needs at each world size, with the most experts that it has at any step. Raises UsageError if its model
    can't be built."""
    job = job.with_experts(job.most_experts)
    return plan_job(job, state_of(job), ours=job.model.is_native)


def state_of(job: JobSpec) -> StatePlan:
    """The model's parameters and buffers. A child process with torch lists those of a model that isn't ours.

    Raises:
        UsageError: the model can't be built; the message is the stderr of the process.
    """
    if job.model.is_native:
        ours, buffers = listed(job.model, job.num_outputs())
        return StatePlan(tuple(ours), tuple(buffers), job.num_outputs())
    found = json.loads(_listed(job.name, job.model_dump_json(by_alias=True)))
    params = tuple(ParamSpec.of(name, tuple(shape)) for name, shape in found["params"])
    return StatePlan(params, tuple((name, tuple(shape)) for name, shape in found["buffers"]), job.num_outputs())


@cache  # a command checks a job before it connects to a cluster, and again as it submits it
def _listed(name: str, job_json: str) -> str:
    listed = run_module("orchestrator.model.param_listing", job_json)
    if listed.returncode:
        raise UsageError(
            f"the model of {name} can't be built:\n{listed.stderr.strip()}", unchanged="Nothing was started."
        )
    return listed.stdout.splitlines()[-1]
