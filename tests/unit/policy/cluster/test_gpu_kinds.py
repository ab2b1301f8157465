"""Kinds of GPUs, as Ray names them."""

import pytest
from ray.util.accelerators import accelerators

from orchestrator.errors import UsageError
from orchestrator.policy.cluster.gpu_kinds import LABEL, MEMORY_GIB, check_alike, kinds_of, largest_memory

GIB = 2**30


def test_ray_knows_all_kinds_by_these_names() -> None:
    assert set(MEMORY_GIB) <= {value for name, value in vars(accelerators).items() if name.isupper()}


def test_the_largest_kind_that_a_selector_admits() -> None:
    assert largest_memory({LABEL: "T4"}) == ("T4", 16 * GIB)
    assert largest_memory({LABEL: "in(T4,A100-40G)"}) == ("A100-40G", 40 * GIB)
    assert largest_memory({LABEL: "!in(B300,GB300)"}) is None  # which admits kinds that aren't known
    assert largest_memory({LABEL: "in(A100,AMD-Instinct-MI300A)"}) is None
    assert largest_memory({LABEL: "TPU-V4"}) is None
    assert largest_memory({"zone": "a"}) is None


def test_gpus_are_counted_by_kind() -> None:
    nodes = [
        {"CPU": 8.0, "GPU": 8.0, "accelerator_type:H100": 1.0},
        {"CPU": 8.0, "GPU": 4.0, "accelerator_type:A100": 1.0},
        {"CPU": 8.0, "GPU": 2.0, "accelerator_type:A100": 1.0},
        {"CPU": 8.0, "accelerator_type:T4": 1.0},
        {"CPU": 8.0, "GPU": 1.0},
    ]
    assert kinds_of(nodes) == {"H100": 8, "A100": 6}


def test_gpus_of_several_kinds_are_named() -> None:
    assert check_alike({}, is_exact=True) == check_alike({"H100": 8}, is_exact=True) == ""
    warning = check_alike({"H100": 8, "A100": 6}, is_exact=False)
    assert warning.startswith("the nodes' GPUs are of 2 kinds: 6 A100, 8 H100; a step takes as long as on the slowest")
    with pytest.raises(UsageError, match="the bits of an exact run depend on the kind") as refused:
        check_alike({"H100": 8, "A100": 6}, is_exact=True)
    assert "{ray.io/accelerator-type: H100}, in workers.label_selector" in refused.value.remedy
