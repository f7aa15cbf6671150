"""Metrics of an engine's actor, as Prometheus reads them from a node."""

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest
from prometheus_client.parser import text_string_to_metric_families

from m3agiqa.config import ImageConfig, RunConfig, load_config
from m3agiqa.corpus import open_corpus
from m3agiqa.decoding import decode_rows
from m3agiqa.prometheus import _COUNTED, gpu_memory
from tests.corpora import encode, picture

DASHBOARD = Path(__file__).parent.parent / "cluster" / "grafana.json"
LIMIT_S = 180.0
COUNTERS = {f"ray_m3agiqa_{name}_total" for name in (*_COUNTED, "images")}
GAUGES = {f"ray_m3agiqa_{name}" for name in ("oldest_batch_seconds", "batches", "gpu_memory_mib")}
QUEUE = {"ray_vllm_num_requests_running", "ray_vllm_num_requests_waiting", "ray_vllm_kv_cache_usage_perc"}


def scraped(port: int) -> dict[str, list[tuple[dict[str, str], float]]]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def decoded(folder: Path) -> pa.Table:
    for i in range(3):
        (folder / f"{i}.png").write_bytes(encode(picture(seed=i)))
    (folder / "bad.png").write_bytes(b"no image")
    corpus = open_corpus(str(folder))
    return pa.concat_tables(decode_rows(next(corpus.shards[0].read()), ImageConfig(), corpus.access))


@contextmanager
def scoring(config: RunConfig, run: str, rows: pa.Table) -> Iterator[int]:
    """An actor that has scored some rows; gives the port of its node's metrics."""
    import ray

    from m3agiqa.progress import Board
    from m3agiqa.prometheus import MeteredActor

    board = ray.remote(num_cpus=0)(Board).remote()
    actor = ray.remote(num_cpus=0)(MeteredActor).remote(config, run, board, False)
    for reference in actor.__call__.options(num_returns="streaming").remote(rows):
        assert ray.get(reference).num_rows == rows.num_rows
    (port,) = {node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]}
    yield port
    ray.kill(actor)


@pytest.mark.slow
def test_an_actor_tells_prometheus_of_its_images(tmp_path, local_ray):
    with scoring(load_config(None, ["engine.kind=simulated"]), "fingerprint-x", decoded(tmp_path)) as port:
        ends = time.monotonic() + LIMIT_S
        mine: dict[str, float] = {}
        while time.monotonic() < ends and mine != {"ok": 3.0, "rejected": 1.0}:
            time.sleep(1)
            found = scraped(port)
            images = found.get("ray_m3agiqa_images_total", [])
            mine = {labels["status"]: value for labels, value in images if labels["run"] == "fingerprint-x"}
        assert mine == {"ok": 3.0, "rejected": 1.0}
        ages = [age for labels, age in found["ray_m3agiqa_oldest_batch_seconds"] if labels["run"] == "fingerprint-x"]
        assert len(ages) == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_vllm_tells_its_own_metrics_at_the_same_place(tmp_path, local_ray):
    settings = ["scoring.aspects=quality", "predictor.path=null", "scoring.max_description_tokens=8"]
    config = load_config(DASHBOARD.parent.parent / "configs" / "tiny.yaml", settings)
    with scoring(config, "fingerprint-v", decoded(tmp_path)) as port:
        ends = time.monotonic() + LIMIT_S
        found: dict[str, list[tuple[dict[str, str], float]]] = {}
        while time.monotonic() < ends and not found.keys() >= {*QUEUE, "ray_vllm_generation_tokens_total"}:
            time.sleep(1)
            found = scraped(port)
        assert found.keys() >= QUEUE
        assert sum(value for _, value in found["ray_vllm_generation_tokens_total"]) > 0


def test_the_dashboard_shows_metrics_that_there_are():
    board = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    named = {name for text in expressions for name in re.findall(r"ray_m3agiqa_\w+", text)}
    assert named <= COUNTERS | GAUGES
    assert named >= GAUGES
    assert {name for text in expressions for name in re.findall(r"ray_vllm_\w+", text)} == QUEUE
    assert {"datasource", "run"} == {variable["name"] for variable in board["templating"]["list"]}
    places = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
    assert len(set(places)) == len(places)


def test_the_page_names_metrics_that_there_are():
    named = set(re.findall(r"ray_m3agiqa_\w+", (DASHBOARD.parent.parent / "docs" / "cluster.md").read_text()))
    assert "ray_m3agiqa_images_total" in named <= COUNTERS | GAUGES


def test_gpu_memory_is_asked_of_the_driver(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\ncase "$*" in *--id=1,2*) printf "10\\n20\\n";; *) printf "5\\n10\\n20\\n";; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert gpu_memory() == [5.0, 10.0, 20.0]
    assert gpu_memory(["1", "2"]) == [10.0, 20.0]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert gpu_memory() == []
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert gpu_memory() == []
