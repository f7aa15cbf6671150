"""What a RayCluster and a RayJob may hold: fields of KubeRay's published CRD (ray.io/v1) and, of pods, those in use.

The CRD is 20,000 lines, most of them Kubernetes' pod; here a field that is not listed is refused, as a mistyped one is
by the API server with strict validation. Plain strings of the CRD (`serviceType`, `operator`, `effect`) are limited
to the words that Kubernetes knows. Sources: github.com/ray-project/kuberay, ray-operator/apis/ray/v1, and the
reference of Kubernetes' PodSpec and Container v1.
"""

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
QUANTITY: Schema = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|Ki|Mi|Gi|Ti)?$"}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}


def fields(required: str = "", **known: Schema) -> Schema:
    """An object of these fields and no others; `required` names those that must be there."""
    return {"type": "object", "properties": known, "required": required.split(), "additionalProperties": False}


def listed(item: Schema) -> Schema:
    return {"type": "array", "minItems": 1, "items": item}


def one_of(*words: str) -> Schema:
    return {"enum": list(words)}


COMMAND = fields("command", command=listed(TEXT))
PROBE = fields(
    "exec", exec=COMMAND, initialDelaySeconds=COUNT, periodSeconds=COUNT, timeoutSeconds=COUNT, failureThreshold=COUNT
)
AMOUNTS: Schema = {
    "type": "object",
    "propertyNames": {"enum": ["cpu", "memory", "nvidia.com/gpu", "ephemeral-storage"]},
    "additionalProperties": QUANTITY,
}
CONTAINER = fields(
    "name image resources",
    name=TEXT,
    image=TEXT,
    env=listed(fields("name", name=TEXT, value=TEXT, valueFrom={"type": "object"})),
    resources=fields("limits requests", limits=AMOUNTS, requests=AMOUNTS),
    ports=listed(fields("containerPort name", containerPort=COUNT, name={"type": "string", "maxLength": 15})),
    readinessProbe=PROBE,
    livenessProbe=PROBE,
    lifecycle=fields("preStop", preStop=fields("exec", exec=COMMAND)),
    securityContext=fields(
        allowPrivilegeEscalation=FLAG, capabilities=fields("drop", drop=listed(TEXT)), readOnlyRootFilesystem=FLAG
    ),
    volumeMounts=listed(fields("name mountPath", name=TEXT, mountPath=TEXT, readOnly=FLAG)),
)
VOLUME = {
    **fields(
        "name",
        name=TEXT,
        persistentVolumeClaim=fields("claimName", claimName=TEXT, readOnly=FLAG),
        emptyDir=fields(medium=one_of("", "Memory"), sizeLimit=QUANTITY),
    ),
    "minProperties": 2,
}
TOLERATION = fields(
    "key operator",
    key=TEXT,
    operator=one_of("Equal", "Exists"),
    value=TEXT,
    effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
)
POD = fields(
    "spec",
    metadata=fields(labels=TEXTS, annotations=TEXTS),
    spec=fields(
        "containers securityContext",
        containers=listed(CONTAINER),
        volumes=listed(VOLUME),
        tolerations=listed(TOLERATION),
        nodeSelector=TEXTS,
        serviceAccountName=TEXT,
        terminationGracePeriodSeconds=COUNT,
        securityContext=fields("runAsNonRoot", runAsNonRoot=FLAG, runAsUser=COUNT, runAsGroup=COUNT, fsGroup=COUNT),
    ),
)
HEAD = fields(
    "rayStartParams template",
    serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
    enableIngress=FLAG,
    rayStartParams=TEXTS,
    template=POD,
)
WORKERS = fields(
    "groupName minReplicas maxReplicas rayStartParams template",
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts=COUNT,
    idleTimeoutSeconds=COUNT,
    rayStartParams=TEXTS,
    template=POD,
)
CLUSTER_SPEC = fields(
    "headGroupSpec rayVersion",  # the operator refuses a token without it
    rayVersion=TEXT,
    authOptions=fields("mode", mode=one_of("token", "disabled")),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=fields(
        upscalingMode=one_of("Default", "Aggressive", "Conservative"), idleTimeoutSeconds=COUNT, image=TEXT
    ),
    headServiceAnnotations=TEXTS,
    suspend=FLAG,
    headGroupSpec=HEAD,
    workerGroupSpecs=listed(WORKERS),
)
JOB_SPEC = fields(
    "entrypoint rayClusterSpec",
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    jobId=TEXT,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    backoffLimit=COUNT,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    entrypointNumCpus={"type": "number"},
    suspend=FLAG,
    rayClusterSpec=CLUSTER_SPEC,
)


def resource(kind: str, longest: int, spec: Schema) -> Schema:
    """A whole resource of the API group; the operator refuses longer names, as it makes others of them."""
    name: Schema = {"type": "string", "pattern": "^[a-z]([a-z0-9-]*[a-z0-9])?$", "maxLength": longest}
    return fields(
        "apiVersion kind metadata spec",
        apiVersion=one_of("ray.io/v1"),
        kind=one_of(kind),
        metadata=fields("name", name=name, labels=TEXTS, namespace=TEXT),
        spec=spec,
    )


RAY_CLUSTER, RAY_JOB = resource("RayCluster", 53, CLUSTER_SPEC), resource("RayJob", 47, JOB_SPEC)
