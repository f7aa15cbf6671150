"""The files of cluster/ by what Kubernetes and KubeRay publish: every field is one of theirs, and of its type."""

import copy
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.cluster.published import VERSIONS, check_resource, kuberay, kubernetes, ray_groups
from tests.cluster.schema import Schema

ROOT = Path(__file__).parent.parent.parent
FILES = ("kuberay-raycluster.yaml", "kuberay-rayjob.yaml")
CRDS = os.environ.get("KUBERAY_CRDS")


def read(name: str) -> dict:
    return yaml.safe_load((ROOT / "cluster" / name).read_text())


def resources() -> Iterator[dict]:
    """Every resource in the files and on the pages: all that has a kind and a version."""
    texts = [path.read_text() for path in sorted((ROOT / "cluster").glob("*.yaml"))]
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("cluster/*.md"), *ROOT.glob("docs/**/*.md")]):
        texts += re.findall(r"^```yaml\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    for content in (each for text in texts for each in yaml.safe_load_all(text)):
        if isinstance(content, dict) and {"apiVersion", "kind"} <= content.keys():
            yield content


def spoiled(content: dict, spoil: Callable[[dict], object]) -> dict:
    content = copy.deepcopy(content)
    spoil(content)
    return content


@pytest.mark.parametrize("version", VERSIONS)
def test_resources_are_what_kubernetes_publishes(version):
    found = list(resources())
    assert {resource["kind"] for resource in found} >= {"RayCluster", "RayJob"}
    for resource in found:
        check_resource(resource, version)


def test_there_are_schemas_of_new_and_of_old_versions():
    """Else nothing would have been checked."""
    oldest, newest = ([int(number) for number in version.split(".")] for version in (VERSIONS[0], VERSIONS[-1]))
    assert oldest <= [1, 30, 0] < [1, 37, 0] <= newest
    said = "of {}.{} to {}.{};".format(*oldest[:2], *newest[:2])
    assert said in (ROOT / "cluster" / "README.md").read_text()


def pod(content: dict) -> dict:
    return ray_groups(content)[2]["template"]["spec"]


def container(content: dict) -> dict:
    return pod(content)["containers"][0]


POD_MISTAKES = {
    "a probe's name": lambda c: container(c).update(livenesProbe={}),
    "a field of a probe": lambda c: container(c)["readinessProbe"].update(period=1),
    "a probe's type": lambda c: container(c)["readinessProbe"].update(periodSeconds="10"),
    "a hook's name": lambda c: container(c)["lifecycle"].update(prestop={}),
    "a hook's type": lambda c: container(c)["lifecycle"]["preStop"]["exec"].update(command="ray stop"),
    "a pod's field in a container": lambda c: container(c)["securityContext"].update(fsGroup=1000),
    "a container's field in a pod": lambda c: pod(c)["securityContext"].update(allowPrivilegeEscalation=False),
    "a user's type": lambda c: pod(c)["securityContext"].update(runAsUser="1000"),
    "a toleration's field": lambda c: pod(c)["tolerations"][0].update(operation="Exists"),
    "a toleration's type": lambda c: pod(c)["tolerations"][1].update(value=True),
    "a volume's source": lambda c: pod(c)["volumes"][0].update(persistentVolumeClaims={"claimName": "a"}),
    "a claim without a name": lambda c: pod(c)["volumes"][0].update(persistentVolumeClaim={}),
    "a mount without a path": lambda c: container(c)["volumeMounts"][0].pop("mountPath"),
    "a container without a name": lambda c: container(c).pop("name"),
    "a pod without containers": lambda c: pod(c).pop("containers"),
    "a time's type": lambda c: pod(c).update(terminationGracePeriodSeconds="120"),
    "a field beside the pod": lambda c: ray_groups(c)[2]["template"].update(status={}),
}
METADATA_MISTAKES = {
    "a label's type": lambda c: c["metadata"].update(labels={"team": 1}),
    "a field of the metadata": lambda c: c["metadata"].update(label={}),
}


@pytest.mark.parametrize("mistake", POD_MISTAKES | METADATA_MISTAKES)
@pytest.mark.parametrize("name", FILES)
def test_a_mistake_in_a_pod_or_in_the_metadata_is_refused(name, mistake):
    spoil = (POD_MISTAKES | METADATA_MISTAKES)[mistake]
    with pytest.raises(jsonschema.ValidationError):
        check_resource(spoiled(read(name), spoil), VERSIONS[-1])


def test_plain_resources_are_checked_by_their_kind():
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "m3agiqa-data"},
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Ti"}}},
    }
    role = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": {"name": "m3agiqa"},
        "rules": [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]}],
    }
    for resource in (claim, role):
        check_resource(resource, VERSIONS[-1])
    for resource, spoil in (
        (claim, lambda c: c["spec"].update(accessMode="ReadWriteMany")),
        (claim, lambda c: c["spec"].update(accessModes="ReadWriteMany")),
        (role, lambda c: c["rules"][0].pop("verbs")),
    ):
        with pytest.raises(jsonschema.ValidationError):
            check_resource(spoiled(resource, spoil), VERSIONS[-1])
    with pytest.raises(FileNotFoundError):
        check_resource(claim | {"apiVersion": "v2"}, VERSIONS[-1])


def test_versions_differ_in_what_they_know():
    """So that it is not one schema that all the others are compared with."""
    pods = [kubernetes(version, "Pod", "v1") for version in (VERSIONS[0], VERSIONS[-1])]
    resized = {"apiVersion": "v1", "kind": "Pod", "spec": {"containers": [{"name": "a", "resizePolicy": []}]}}
    assert [not list(known.iter_errors(resized)) for known in pods] == [False, True]


TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "format": "int32"}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
QUANTITY = {"anyOf": [{"type": "integer"}, TEXT], "pattern": "^[0-9]+(Ki|Mi|Gi)?$", "x-kubernetes-int-or-string": True}


def part(required: str = "", **known: Schema) -> Schema:
    """As in a CRD: what is not listed is nowhere forbidden in so many words."""
    return {"type": "object", "properties": known} | ({"required": required.split()} if required else {})


def listed(item: Schema) -> Schema:
    return {"type": "array", "items": item, "x-kubernetes-list-type": "atomic"}


def ray_parts() -> tuple[Schema, Schema]:
    """The specs of a RayCluster and a RayJob in a CRD's form, with as much of a pod as shows every form."""
    amounts, marked = (
        {"type": "object", "additionalProperties": amount}
        for amount in (QUANTITY, {"x-kubernetes-int-or-string": True})
    )
    containers = part("name", name=TEXT, image=TEXT, resources=part(limits=amounts, requests=marked))
    spec = part("containers", containers=listed(containers | {"x-kubernetes-preserve-unknown-fields": True}))
    template = part(spec=spec | {"x-kubernetes-preserve-unknown-fields": True})
    worker = part(
        "groupName maxReplicas minReplicas template",
        groupName=TEXT,
        replicas=COUNT | {"default": 0},
        minReplicas=COUNT | {"default": 0},
        maxReplicas=COUNT | {"default": 9},
        rayStartParams=TEXTS,
        template=template,
    )
    mode, upscaling = ({"type": "string", "enum": words} for words in (["disabled", "token"], ["Default"]))
    cluster = part(
        "headGroupSpec",
        rayVersion=TEXT | {"nullable": True},
        authOptions=part(mode=mode),
        enableInTreeAutoscaling=FLAG,
        autoscalerOptions=part(upscalingMode=upscaling, idleTimeoutSeconds=COUNT),
        headGroupSpec=part(
            "template",
            serviceType=TEXT,
            enableIngress=FLAG,
            rayStartParams=TEXTS,
            template=template,
            headService=part(),
        ),
        workerGroupSpecs=listed(worker),
    )
    job = part(
        entrypoint=TEXT,
        submissionMode=TEXT | {"default": "K8sJobMode"},
        backoffLimit=COUNT | {"minimum": 0, "exclusiveMinimum": False},
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=COUNT,
        rayClusterSpec=cluster,
    )
    return cluster, job


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder like that of KubeRay's Helm chart; an older version comes first, which knows nothing."""
    for kind, spec in zip(("RayCluster", "RayJob"), ray_parts(), strict=True):
        root = part(apiVersion=TEXT, kind=TEXT, metadata={"type": "object"}, spec=spec, status=part())
        versions = [
            {"name": name, "schema": {"openAPIV3Schema": schema}, "served": True}
            for name, schema in (("v1alpha1", part(spec=part())), ("v1", root))
        ]
        spec = {"group": "ray.io", "names": {"kind": kind}, "scope": "Namespaced", "versions": versions}
        made = {"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "spec": spec}
        (tmp_path / f"ray.io_{kind.lower()}s.yaml").write_text("---\n" + yaml.safe_dump(made))
    return tmp_path


def cluster(content: dict) -> dict:
    return content["spec"].get("rayClusterSpec", content["spec"])


RAY_MISTAKES = {
    "a field": lambda c: cluster(c).update(workerGroupSpec=[]),
    "a field of a list's item": lambda c: ray_groups(c)[1].update(replica=1),
    "a field beside the spec": lambda c: c.update(specs={}),
    "a type": lambda c: ray_groups(c)[1].update(minReplicas="0"),
    "a type in a map": lambda c: ray_groups(c)[0]["rayStartParams"].update({"num-cpus": 0}),
    "a word": lambda c: cluster(c)["authOptions"].update(mode="tokens"),
    "a null": lambda c: cluster(c).update(enableInTreeAutoscaling=None),
    "a required field": lambda c: cluster(c).pop("headGroupSpec"),
    "a required field of a list's item": lambda c: ray_groups(c)[1].pop("groupName"),
    "a required field of a pod that holds unknown ones": lambda c: pod(c).pop("containers"),
    "an amount": lambda c: container(c)["resources"]["limits"].update(memory="64GB"),
    "an amount's type": lambda c: container(c)["resources"]["limits"].update(memory=["64Gi"]),
    "an amount's type that is only marked": lambda c: container(c)["resources"]["requests"].update(memory=["64Gi"]),
    "another version": lambda c: c.update(apiVersion="ray.io/v1alpha1"),
    "another kind": lambda c: c.update(kind="Rayjob" if c["kind"] == "RayJob" else "Raycluster"),
    "no name": lambda c: c["metadata"].pop("name"),
    "no spec": lambda c: c.pop("spec"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_crd_in_small_takes_the_files_and_what_it_leaves_open(small, name):
    for open_here in (
        lambda c: None,
        lambda c: c["metadata"].update(labels={"team": "a"}),
        lambda c: c.update(status={}),
        lambda c: cluster(c).update(rayVersion=None),
        lambda c: pod(c).update(anything={"at": "all"}),
        lambda c: container(c)["resources"]["limits"].update(cpu=8),
        lambda c: ray_groups(c)[1].pop("minReplicas"),  # it has a default
    ):
        kuberay(small, read(name)["kind"]).validate(spoiled(read(name), open_here))


@pytest.mark.parametrize("mistake", RAY_MISTAKES)
@pytest.mark.parametrize("name", FILES)
def test_a_crd_in_small_refuses_a_mistake(small, name, mistake):
    with pytest.raises(jsonschema.ValidationError):
        kuberay(small, read(name)["kind"]).validate(spoiled(read(name), RAY_MISTAKES[mistake]))


@pytest.mark.parametrize("name", FILES)
def test_an_object_without_fields_in_a_crd_has_none(small, name):
    content = spoiled(read(name), lambda c: ray_groups(c)[0].update(headService={}))
    known = kuberay(small, content["kind"])
    known.validate(content)
    with pytest.raises(jsonschema.ValidationError, match="metadata"):
        known.validate(spoiled(content, lambda c: ray_groups(c)[0]["headService"].update(metadata={})))


def test_contributors_fetch_the_crds_of_the_oldest_kuberay_that_the_page_allows(small):
    (oldest,) = re.findall(r"^Needs KubeRay (\S+) or later", (ROOT / "docs" / "cluster.md").read_text(), re.MULTILINE)
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert f"/kuberay/v{oldest}/helm-chart/kuberay-operator/crds\n" in text
    folder, before, ends, after = re.search(r'--output-dir (\S+) -O "\$crds/(.*?){(.*?)}(.*?)"', text).groups()
    assert {f"{before}{end}{after}" for end in ends.split(",")} == {path.name for path in small.iterdir()}
    assert f"$ KUBERAY_CRDS={folder} make test TESTS={Path(__file__).relative_to(ROOT)}\n" in text


@pytest.mark.skipif(
    not CRDS,
    reason="KUBERAY_CRDS names no folder with KubeRay's CRDs; CONTRIBUTING.md has the commands that fetch them",
)
@pytest.mark.parametrize("name", FILES)
def test_the_files_are_valid_by_kuberays_own_crds(name):
    content = read(name)
    known = kuberay(Path(CRDS), content["kind"])
    known.validate(content)
    for mistake, spoil in (POD_MISTAKES | RAY_MISTAKES).items():
        assert not known.is_valid(spoiled(content, spoil)), mistake
