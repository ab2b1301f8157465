"""The manifests for KubeRay have only fields that it knows, of the right type, and what they say is safe."""

import copy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from pydantic import ValidationError

from orchestrator.spec.job_file.loading import load_job
from tests.unit.cluster_files.kubernetes import (
    ConfigMap,
    NetworkPolicy,
    PersistentVolumeClaim,
    RayCluster,
    RayClusterSpec,
    RayJob,
    checked,
    documents,
    pods,
)

FOLDER = Path(__file__).parents[3] / "cluster" / "kuberay"
OVERLAY = FOLDER / "kustomization.yaml"
MANIFESTS = sorted(path for path in FOLDER.glob("*.yaml") if path != OVERLAY)
CLUSTER = documents(FOLDER / "raycluster.yaml")
JOB = documents(FOLDER / "rayjob.yaml")


def _spec(manifest: Path) -> RayClusterSpec:
    (found,) = [part for part in map(checked, documents(manifest)) if isinstance(part, RayCluster | RayJob)]
    return found.spec if isinstance(found, RayCluster) else found.spec.rayClusterSpec


by_manifest = pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)


def test_there_are_a_cluster_that_stays_and_one_for_a_run() -> None:
    assert [type(checked(document)) for document in CLUSTER] == [PersistentVolumeClaim, NetworkPolicy, RayCluster]
    assert [type(checked(document)) for document in JOB] == [ConfigMap, RayJob]


@by_manifest
def test_a_token_is_required_and_comes_from_a_secret(manifest: Path) -> None:
    assert _spec(manifest).authOptions.mode == "token"
    assert "kind: Secret" not in manifest.read_text()


@by_manifest
def test_nothing_is_reached_from_outside(manifest: Path) -> None:
    spec = _spec(manifest)
    assert spec.headGroupSpec.serviceType == "ClusterIP"
    policy = checked(CLUSTER[1])
    assert isinstance(policy, NetworkPolicy)
    chosen = policy.spec.podSelector.matchLabels
    labels = [group.template.metadata.labels for group in (spec.headGroupSpec, *spec.workerGroupSpecs)]
    assert all(chosen.items() <= found.items() for found in labels)
    within, operator = policy.spec.ingress
    assert [peer.podSelector and peer.podSelector.matchLabels for peer in within.from_] == [chosen]
    assert [port.port for port in operator.ports] == [8265]


@by_manifest
def test_pods_run_as_the_users_of_the_image_with_no_more_rights(manifest: Path) -> None:
    for pod in pods(_spec(manifest)):
        assert pod.securityContext.runAsNonRoot and pod.securityContext.runAsUser == 1000
        assert all(not container.securityContext.allowPrivilegeEscalation for container in pod.containers)
        assert all(container.securityContext.capabilities.drop == ["ALL"] for container in pod.containers)


@by_manifest
def test_all_nodes_have_run_storage_at_the_same_place(manifest: Path) -> None:
    claim = checked(CLUSTER[0])
    assert isinstance(claim, PersistentVolumeClaim) and claim.spec.accessModes == ["ReadWriteMany"]
    for pod in pods(_spec(manifest)):
        assert [v.persistentVolumeClaim.claimName for v in pod.volumes if v.persistentVolumeClaim] == [
            claim.metadata.name
        ]
        assert "/runs" in {mount.mountPath for mount in pod.containers[0].volumeMounts}


@by_manifest
def test_the_version_is_that_of_the_image(manifest: Path) -> None:
    assert _spec(manifest).rayVersion == ray.__version__


def test_both_describe_the_same_cluster() -> None:
    alone = _spec(FOLDER / "raycluster.yaml").model_dump()
    for_a_run = _spec(FOLDER / "rayjob.yaml").model_dump()
    head = for_a_run["headGroupSpec"]["template"]["spec"]
    assert [v.pop("name") for v in head["volumes"][1:]] == [
        m.pop("name") for m in head["containers"][0]["volumeMounts"][1:]
    ]
    del head["volumes"][1:], head["containers"][0]["volumeMounts"][1:]  # the job's files
    assert for_a_run == alone


def test_the_job_of_the_manifest_is_valid_and_fits_its_nodes(tmp_path: Path) -> None:
    config, job = checked(JOB[0]), checked(JOB[1])
    assert isinstance(config, ConfigMap) and isinstance(job, RayJob)
    for name, text in config.data.items():
        (tmp_path / name).write_text(text)
    spec = load_job(tmp_path / "job.yaml")
    (group,) = job.spec.rayClusterSpec.workerGroupSpecs
    assert spec.name == job.metadata.name
    assert spec.storage == "/runs"
    assert spec.resources.cpus <= int(group.template.spec.containers[0].resources.limits["cpu"])
    subprocess.run(["bash", "-n", str(tmp_path / "run.sh")], check=True, timeout=100)
    assert job.spec.entrypoint == "bash /job/run.sh"


SPEC = ("spec",)
HEAD = ("spec", "headGroupSpec", "template", "spec")
WORKERS = ("spec", "workerGroupSpecs", 0)


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        (SPEC, "gcsFaultTolerance", {}),
        (SPEC, "rayVersion", 2.6),
        (("spec", "authOptions"), "mode", "Token"),
        (("spec", "authOptions"), "token", "s3cret"),
        (("spec", "gcsFaultToleranceOptions"), "redisAddress", "redis:6379"),
        (("spec", "gcsFaultToleranceOptions"), "backend", "redis"),
        (("spec", "autoscalerOptions"), "version", 2),
        (("spec", "headGroupSpec", "rayStartParams"), "num-cpus", 0),
        (HEAD, "restartpolicy", "Never"),
        (HEAD, "volumes", []),
        ((*HEAD, "containers", 0), "image", None),
        ((*HEAD, "containers", 0, "resources"), "limits", {"cpu": "two"}),
        ((*HEAD, "containers", 0, "ports", 0), "containerPort", 65536),
        (WORKERS, "maxReplicas", "8"),
        (WORKERS, "minReplicas", 2),
        ((*WORKERS, "template", "spec", "tolerations", 0), "effect", "NoSchedul"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else None,
)
def test_a_mistake_in_a_cluster_is_found(path: tuple[str | int, ...], key: str, value: Any) -> None:
    broken = copy.deepcopy(CLUSTER[2])
    place: Any = broken
    for step in path:
        place = place[step]
    place[key] = value
    with pytest.raises(ValidationError):
        checked(broken)


@pytest.mark.parametrize(
    ("key", "value"),
    [("submissionMode", "Sidecar"), ("shutdownAfterJobFinishes", False), ("entryPoint", "true"), ("backoffLimit", -1)],
)
def test_a_mistake_in_a_job_is_found(key: str, value: Any) -> None:
    broken = copy.deepcopy(JOB[1])
    broken["spec"][key] = value
    with pytest.raises(ValidationError):
        checked(broken)


def test_a_kind_that_is_not_known_is_found() -> None:
    with pytest.raises(ValidationError):
        checked({**CLUSTER[2], "kind": "Raycluster"})


def test_a_duplicate_key_is_found(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("kind: RayJob\nspec: {}\nkind: RayCluster\n")
    with pytest.raises(ValueError, match="twice"):
        documents(tmp_path / "twice.yaml")


def _patched(documents_of_cluster: list[Any]) -> list[Any]:
    """The documents with the operations of the overlay for GPUs (RFC 6902), as kustomize applies them."""
    patched = copy.deepcopy(documents_of_cluster)
    (overlay,) = documents(OVERLAY)
    assert overlay["resources"] == ["raycluster.yaml"]
    (patch,) = overlay["patches"]
    (cluster,) = [document for document in patched if document["kind"] == patch["target"]["kind"]]
    for operation in yaml.safe_load(patch["patch"]):
        *way, last = [part.replace("~1", "/") for part in operation["path"].split("/")[1:]]
        place = cluster
        for part in way:
            place = place[int(part)] if isinstance(place, list) else place[part]
        if last == "-":
            place.append(operation["value"])
        else:
            assert (last in place) == (operation["op"] == "replace")
            place[last] = operation["value"]
    return patched


def test_the_overlay_gives_each_worker_a_gpu_and_the_head_none() -> None:
    (cluster,) = [part for part in map(checked, _patched(CLUSTER)) if isinstance(part, RayCluster)]
    (group,) = cluster.spec.workerGroupSpecs
    (container,) = group.template.spec.containers
    assert container.resources.limits["nvidia.com/gpu"] == container.resources.requests["nvidia.com/gpu"] == "1"
    assert container.image.endswith("-gpu")
    head = cluster.spec.headGroupSpec.template.spec.containers[0]
    assert "nvidia.com/gpu" not in head.resources.limits and not head.image.endswith("-gpu")
