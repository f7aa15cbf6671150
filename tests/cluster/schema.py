"""What a RayCluster and a RayJob may hold of Ray's fields, and the words of their pods that are no plain strings.

A field of Ray's that is not listed is refused, as a mistyped one is by the API server with strict validation. The list
was made from KubeRay's Go types and published CRDs (ray.io/v1; github.com/ray-project/kuberay, ray-operator/apis/ray/v1
and helm-chart/kuberay-operator/crds) and leaves out what no file here uses. What those have as plain strings
(`submissionMode`, `serviceType`) is limited to the words that KubeRay knows, and what its operator refuses is refused.

The pods are held to Kubernetes' published schemas (`published.py`). Added here is what those leave open and the API
server refuses or takes for something else: words, amounts, a volume without a source, a probe without a question.
"""

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
QUANTITY: Schema = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|Ki|Mi|Gi|Ti)?$"}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}


def holds(required: str = "", **known: Schema) -> Schema:
    """An object of which more is known than Kubernetes' schema says; `required` names fields that must be there."""
    return {"type": "object", "properties": known, "required": required.split()}


def fields(required: str = "", **known: Schema) -> Schema:
    """An object of these fields and no others."""
    return {**holds(required, **known), "additionalProperties": False}


def listed(item: Schema) -> Schema:
    return {"type": "array", "minItems": 1, "items": item}


def one_of(*words: str) -> Schema:
    return {"enum": list(words)}


def action(**known: Schema) -> Schema:
    """What a probe or a hook does: one thing of those that there are."""
    ways = ("exec", "grpc", "httpGet", "sleep", "tcpSocket")
    command = holds("command", command=listed(TEXT))
    return {**holds(exec=command, **known), "oneOf": [{"required": [way]} for way in ways]}


PROBE = action(initialDelaySeconds=COUNT, periodSeconds=COUNT, timeoutSeconds=COUNT, failureThreshold=COUNT)
AMOUNTS: Schema = {
    "type": "object",
    "propertyNames": {"enum": ["cpu", "memory", "nvidia.com/gpu", "ephemeral-storage"]},
    "additionalProperties": QUANTITY,
}
CONTAINER = holds(
    "name image resources",
    image=TEXT,
    imagePullPolicy=one_of("Always", "IfNotPresent", "Never"),
    resources=holds("limits requests", limits=AMOUNTS, requests=AMOUNTS),
    ports=listed(holds("name", containerPort={"minimum": 1, "maximum": 65535}, name={"maxLength": 15})),
    readinessProbe=PROBE,
    livenessProbe=PROBE,
    lifecycle=holds(preStop=action()),
)
VOLUME: Schema = {  # one that has only its name is an empty directory
    **holds("name", emptyDir=holds(medium=one_of("", "Memory"), sizeLimit=QUANTITY)),
    "minProperties": 2,
}
TOLERATION = holds(
    "key operator",
    operator=one_of("Equal", "Exists"),
    effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
)
TEMPLATE = fields(
    "spec",
    metadata=fields(name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS, finalizers=listed(TEXT)),
    spec=holds(
        "containers",
        containers=listed(CONTAINER),
        volumes=listed(VOLUME),
        tolerations=listed(TOLERATION),
        # The autoscaler replaces pods itself.
        restartPolicy=one_of("Never"),
    ),
)
HEAD = fields(
    "rayStartParams template",
    serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
    enableIngress=FLAG,
    rayStartParams=TEXTS,
    template=TEMPLATE,
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
    template=TEMPLATE,
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
        metadata=holds("name", name=name),
        spec=spec,
    )


RAY_CLUSTER, RAY_JOB = resource("RayCluster", 53, CLUSTER_SPEC), resource("RayJob", 47, JOB_SPEC)
