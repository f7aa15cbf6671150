"""What Kubernetes publishes, as JSON Schema that refuses every field that is not in it.

The schemas are data of the package kubernetes-validate; its code is not needed.
"""

import functools
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

from jsonschema import Draft202012Validator
from referencing import Registry, Resource

(PACKAGE,) = importlib.util.find_spec("kubernetes_validate").submodule_search_locations
SCHEMAS = Path(PACKAGE) / "kubernetes-json-schema"
VERSIONS = sorted(
    (folder.name.split("-")[0].removeprefix("v") for folder in SCHEMAS.glob("v*-local-strict")),
    key=lambda version: [int(number) for number in version.split(".")],
)


@functools.cache
def kubernetes(version: str, kind: str, api_version: str) -> Draft202012Validator:
    """The schema of a kind of resource in a version of Kubernetes; there is no file for one that it does not have."""
    folder = SCHEMAS / f"v{version}-local-strict"
    group, _, number = api_version.rpartition("/")
    name = "-".join(part for part in (kind.lower(), group.split(".")[0], number) if part)
    schema, definitions = (json.loads((folder / f"{file}.json").read_text()) for file in (name, "_definitions"))
    return Draft202012Validator(schema, registry=Resource.from_contents(definitions) @ Registry())


def ray_groups(resource: dict) -> list[dict]:
    """The head's group and the workers' of a RayCluster or of a RayJob's cluster."""
    spec = resource["spec"].get("rayClusterSpec", resource["spec"])
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def check_resource(resource: dict, version: str) -> None:
    """A resource of Kubernetes itself; of Ray's, all that Kubernetes publishes: its pods' templates and metadata."""
    for part in kubernetes_parts(resource):
        kubernetes(version, part["kind"], part["apiVersion"]).validate(part)


def kubernetes_parts(resource: dict) -> Iterator[dict]:
    if not resource["apiVersion"].startswith("ray.io/"):
        yield resource
        return
    for group in ray_groups(resource):
        # Exactly what a group's template is: a Pod has a status besides.
        template = {"apiVersion": "v1", "kind": "PodTemplate", "template": group["template"]}
        yield template | {"metadata": resource["metadata"]}
