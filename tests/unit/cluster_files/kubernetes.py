"""What Kubernetes and KubeRay 1.7 take, as far as our manifests use it: an unknown field or a wrong type is an error.

Fields, types and enumerations are those of the resource definitions, which `ray-operator/config/crd/bases/` of
ray-project/kuberay holds whole; a manifest that needs a further field gets it here. Where the operator refuses what
they allow, the rule stands beside the field.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, model_validator

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
ShortName = Annotated[str, StringConstraints(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=47)]
Quantity = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|[KMGTPE]i?)?$")]
Port = Annotated[int, Field(ge=1, le=65535)]
Id = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Labels = dict[str, str]


def _absolute(path: str) -> str:
    if not path.startswith("/"):
        raise ValueError(f"{path} is not absolute")
    return path


Path_ = Annotated[str, AfterValidator(_absolute)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Part):
    name: Name


class Capabilities(Part):
    drop: list[str]


class ContainerSecurity(Part):
    allowPrivilegeEscalation: bool
    capabilities: Capabilities


class Seccomp(Part):
    type: Literal["RuntimeDefault", "Unconfined", "Localhost"]


class PodSecurity(Part):
    runAsNonRoot: bool
    runAsUser: Id
    runAsGroup: Id
    fsGroup: Id
    fsGroupChangePolicy: Literal["Always", "OnRootMismatch"]
    seccompProfile: Seccomp


class Resources(Part):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity] = {}


class ContainerPort(Part):
    containerPort: Port
    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,15}$")]


class Mount(Part):
    name: Name
    mountPath: Path_
    readOnly: bool = False


class Container(Part):
    name: ShortName
    image: str
    securityContext: ContainerSecurity
    ports: list[ContainerPort]
    resources: Resources
    volumeMounts: list[Mount]


class Claim(Part):
    claimName: Name


class ConfigMapSource(Part):
    name: Name


class Volume(Part):
    name: Name
    persistentVolumeClaim: Claim | None = None
    configMap: ConfigMapSource | None = None

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.persistentVolumeClaim is None) == (self.configMap is None):
            raise ValueError(f"volume {self.name} needs one source")
        return self


class Toleration(Part):
    key: str
    operator: Literal["Equal", "Exists"]
    value: str = ""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class Selector(Part):
    matchLabels: Labels = {}


class Spread(Part):
    maxSkew: Annotated[int, Field(ge=1)]
    topologyKey: str
    whenUnsatisfiable: Literal["DoNotSchedule", "ScheduleAnyway"]
    labelSelector: Selector


class PodSpec(Part):
    securityContext: PodSecurity
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume]
    tolerations: list[Toleration] = []
    topologySpreadConstraints: list[Spread] = []
    automountServiceAccountToken: bool = True
    terminationGracePeriodSeconds: Count = 30

    @model_validator(mode="after")
    def _mounts_what_there_is(self) -> Self:
        known = {volume.name for volume in self.volumes}
        unknown = {mount.name for container in self.containers for mount in container.volumeMounts} - known
        if unknown:
            raise ValueError(f"mounts of volumes that the pod doesn't have: {', '.join(sorted(unknown))}")
        return self


class PodMetadata(Part):
    labels: Labels


class PodTemplate(Part):
    metadata: PodMetadata
    spec: PodSpec


class Authentication(Part):
    mode: Literal["disabled", "token"]
    secretName: Name


class Storage(Part):
    size: Quantity


class FaultTolerance(Part):
    backend: Literal["redis", "rocksdb"]
    storage: Storage | None = None
    redisAddress: str | None = None

    @model_validator(mode="after")
    def _goes_with_its_backend(self) -> Self:
        if (self.backend == "rocksdb") != (self.redisAddress is None):
            raise ValueError("redisAddress is for redis, and only for redis")
        if self.backend == "redis" and self.storage is not None:
            raise ValueError("storage is for rocksdb only")
        return self


class Autoscaler(Part):
    version: Literal["v1", "v2"]
    idleTimeoutSeconds: Count
    securityContext: ContainerSecurity
    resources: Resources


class HeadGroup(Part):
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"]
    rayStartParams: dict[str, str]
    template: PodTemplate


class WorkerGroup(Part):
    groupName: ShortName
    replicas: Count
    minReplicas: Count
    maxReplicas: Count
    rayStartParams: dict[str, str]
    template: PodTemplate

    @model_validator(mode="after")
    def _is_within_its_bounds(self) -> Self:
        if not self.minReplicas <= self.replicas <= self.maxReplicas:
            raise ValueError(f"{self.replicas} replicas are not within {self.minReplicas} to {self.maxReplicas}")
        return self


class RayClusterSpec(Part):
    rayVersion: Annotated[str, StringConstraints(pattern=r"^\d+\.\d+\.\d+$")]
    authOptions: Authentication
    gcsFaultToleranceOptions: FaultTolerance
    enableInTreeAutoscaling: bool
    autoscalerOptions: Autoscaler
    headGroupSpec: HeadGroup
    workerGroupSpecs: Annotated[list[WorkerGroup], Field(min_length=1)]


class RayJobSpec(Part):
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    entrypoint: str
    backoffLimit: Count
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: Count
    rayClusterSpec: RayClusterSpec

    @model_validator(mode="after")
    def _lives_only_with_its_cluster(self) -> Self:
        if self.ttlSecondsAfterFinished and not self.shutdownAfterJobFinishes:
            raise ValueError("ttlSecondsAfterFinished needs shutdownAfterJobFinishes")
        return self


class ClaimSpec(Part):
    accessModes: list[Literal["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"]]
    storageClassName: str
    resources: Resources


class Peer(Part):
    podSelector: Selector | None = None
    namespaceSelector: Selector | None = None


class PolicyPort(Part):
    protocol: Literal["TCP", "UDP", "SCTP"]
    port: Port


class IngressRule(Part):
    from_: Annotated[list[Peer], Field(alias="from", min_length=1)]
    ports: list[PolicyPort] = []


class PolicySpec(Part):
    podSelector: Selector
    policyTypes: list[Literal["Ingress", "Egress"]]
    ingress: list[IngressRule]


class RayCluster(Part):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: RayClusterSpec


class RayJob(Part):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec


class ConfigMap(Part):
    apiVersion: Literal["v1"]
    kind: Literal["ConfigMap"]
    metadata: Metadata
    data: dict[str, str]


class PersistentVolumeClaim(Part):
    apiVersion: Literal["v1"]
    kind: Literal["PersistentVolumeClaim"]
    metadata: Metadata
    spec: ClaimSpec


class NetworkPolicy(Part):
    apiVersion: Literal["networking.k8s.io/v1"]
    kind: Literal["NetworkPolicy"]
    metadata: Metadata
    spec: PolicySpec


Resource = RayCluster | RayJob | ConfigMap | PersistentVolumeClaim | NetworkPolicy
_ADAPTER: TypeAdapter[Resource] = TypeAdapter(Annotated[Resource, Field(discriminator="kind")])


def checked(document: Any) -> Resource:
    """The document as what its `kind` says. Raises ValidationError, of which each line names a field by its path."""
    return _ADAPTER.validate_python(document)


def documents(manifest: Path) -> list[dict[str, Any]]:
    return list(yaml.load_all(manifest.read_text(encoding="utf-8"), Loader=_Loader))


class _Loader(yaml.SafeLoader):
    """As Kubernetes reads YAML: a key that stands twice in a mapping is an error, not the later of the two."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise ValueError(f"{node.start_mark}: twice in a mapping: {', '.join(map(str, sorted(twice)))}")
        return super().construct_mapping(node, deep)


def pods(spec: RayClusterSpec) -> list[PodSpec]:
    return [spec.headGroupSpec.template.spec, *(group.template.spec for group in spec.workerGroupSpecs)]
