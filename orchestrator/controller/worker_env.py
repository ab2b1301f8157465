"""Environment variables of worker processes."""

from orchestrator.spec.job import JobSpec

# A worker keeps freed memory (glibc's mallopt variables): every step and every fence allocates tens of megabytes again,
# and getting them from the kernel again costs more than filling them. At 17 M parameters on two cores the median stall
# of a rescale fell from 0.6 to 0.3 s. Huge pages, where the kernel gives them on request: a killed process returns its
# memory before it closes its connections, and until then no peer notices. With 1.2 GB of small pages that takes 80 ms,
# with huge ones 11 (a scratch script).
#
# A thread spins at a barrier for at most 3,000 iterations, not libgomp's 300,000: the thread it waits for may need its
# core. On two cores a step of a small model, alone and beside a twin, took 50 and 290 ms with 3,000, 55 and 760 with
# 10,000, 65 and 155 with 1,000, 130 and 120 with 200, and 65 and 340 with libgomp's (two processes of two threads each,
# a scratch script, 2026-12-02).
WORKER_ENV = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "GOMP_SPINCOUNT": "3000",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
}

# A failed peer may end the communicator, but never the process, whose state is needed now: 2 does that. The monitor of
# NCCL's watchdog would end a process that waits in an abort. A wait for a communicator that starts holds the lock that
# its abort needs, for 30 minutes by default. Not tried on GPUs yet.
NCCL_ENV = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_NONBLOCKING_TIMEOUT": "60",  # s, as of `orchestrator.engine.process_groups`
}

# For bitwise reproducible runs, libraries must not choose algorithms by current load or by memory addresses. On one
# processor 166 of 400 shapes of fp32 products had other bits if a matrix began at another address, and none with
# MKL_CBWR, which cost nothing (a scratch script).
EXACT_ENV = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # required by torch.use_deterministic_algorithms
    "MKL_CBWR": "AUTO,STRICT",
    "MKL_DYNAMIC": "FALSE",
    "OMP_DYNAMIC": "FALSE",
}


def env_of_worker(job: JobSpec, threads: int) -> dict[str, str]:
    """Environment of a worker with this number of torch threads. The job's own variables win over `WORKER_ENV` only."""
    env = WORKER_ENV | dict(job.envs) | {"OMP_NUM_THREADS": str(threads)}
    env |= EXACT_ENV if job.train.is_exact else {}
    return env | (NCCL_ENV if job.resources.num_gpus else {"DS_ACCELERATOR": "cpu"})
