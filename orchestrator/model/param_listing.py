"""Process that prints the parameters of a job's model, since the planning process doesn't load torch.

    python -m orchestrator.model.param_listing < job.json

Prints `{"params": [[name, shape], ...], "buffers": ...}`.
"""

import json
import sys

from orchestrator.model.factory import catalogue
from orchestrator.requirements import use_requirements
from orchestrator.spec.job import JobSpec


def main() -> None:
    job = JobSpec.model_validate_json(sys.stdin.read())
    if job.has_own_code:
        use_requirements(job.pip)
    params, buffers = catalogue(job.model, job.num_outputs())
    print(json.dumps({"params": [[p.name, p.shape] for p in params], "buffers": buffers}))


if __name__ == "__main__":
    main()
