"""The files of cluster/ by what Kubernetes publishes: every field is one of theirs, and of its type."""

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.cluster.published import VERSIONS, check_resource, kubernetes, ray_groups

ROOT = Path(__file__).parent.parent.parent
FILES = ("kuberay-raycluster.yaml", "kuberay-rayjob.yaml")


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
