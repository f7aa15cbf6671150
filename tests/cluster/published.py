"""What Kubernetes and KubeRay publish, as JSON Schema that refuses every field that is not in it.

Kubernetes' schemas are data of the package kubernetes-validate; its code is not needed. KubeRay's CRDs are in no
package: whoever has them names their folder in `KUBERAY_CRDS` (CONTRIBUTING.md).
"""

import functools
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import yaml
from jsonschema import Draft4Validator, Draft202012Validator
from referencing import Registry, Resource

from tests.cluster.schema import Schema

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


def kuberay(crds: Path, kind: str) -> Draft4Validator:
    """The schema of a kind of resource by its CRD, which lies in a folder like that of KubeRay's Helm chart."""
    return json_schema(yaml.load((crds / f"ray.io_{kind.lower()}s.yaml").read_text(), yaml.CSafeLoader), "v1")


def json_schema(definition: dict, version: str) -> Draft4Validator:
    """The validator of a version in a CustomResourceDefinition, as strict as `kubectl apply --validate=strict`.

    What remains to the API server: rules in CEL (`x-kubernetes-validations`), formats, and keys that must be unique
    in a list. A null where none may be, which it would drop, is refused: in a file it is a value that was forgotten.
    A resource's own metadata is Kubernetes' business, not the definition's.
    """
    (found,) = (each for each in definition["spec"]["versions"] if each["name"] == version)
    schema = strict(found["schema"]["openAPIV3Schema"])
    group, kind = definition["spec"]["group"], definition["spec"]["names"]["kind"]
    schema["properties"] |= {
        "apiVersion": {"enum": [f"{group}/{version}"]},
        "kind": {"enum": [kind]},
        "metadata": {"type": "object", "required": ["name"]},
    }
    schema["required"] = sorted({"apiVersion", "kind", "metadata", "spec"}.union(schema.get("required", [])))
    Draft4Validator.check_schema(schema)
    return Draft4Validator(schema)  # OpenAPI 3.0 is of that draft


def strict(node: Schema) -> Schema:
    """A part of a structural schema as JSON Schema: what it does not list, it refuses."""
    made = {word: value for word, value in node.items() if not word.startswith("x-") and word != "nullable"}
    if "properties" in node:
        made["properties"] = {name: strict(part) for name, part in node["properties"].items()}
    for word in ("items", "additionalProperties"):
        if isinstance(node.get(word), dict):
            made[word] = strict(node[word])
    if node.get("type") == "object" and not node.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    if node.get("x-kubernetes-int-or-string"):
        made.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    # Defaults are filled in before anything is required. No list at all, as this draft has no empty ones.
    required = [name for name in made.pop("required", []) if "default" not in node.get("properties", {}).get(name, {})]
    if required:
        made["required"] = required
    return {"anyOf": [{"type": "null"}, made]} if node.get("nullable") else made
