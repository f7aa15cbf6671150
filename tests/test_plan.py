"""`m3agiqa plan`: every failed check is named with its cure, and nothing is left behind."""

from pathlib import Path

import pytest

import m3agiqa.plan
from m3agiqa.cli import main
from m3agiqa.runs import Output
from tests.corpora import encode, picture

SIMULATED = ["--set", "engine.kind=simulated"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.png").write_bytes(encode(picture(seed=i)))
        (folder / f"{i}.txt").write_text("a fox")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def planned(capsys, *arguments: object) -> tuple[int, str]:
    code = main(["plan", *map(str, arguments)])
    return code, capsys.readouterr().out


def test_a_run_without_faults(tmp_path, corpus, capsys):
    code, said = planned(capsys, "--input", corpus, "--output", tmp_path / "deep/out", *SIMULATED)
    assert code == 0, said
    assert "11 rows; of 11 looked at 10 can be used" in said
    assert "1 rejected, the first one since: not an image" in said
    assert "1 have no prompt" in said
    assert "failed" not in said
    assert not (tmp_path / "deep").exists()


def test_what_it_would_take_is_measured(tmp_path, corpus, capsys):
    settings = [*SIMULATED, "engine.simulated_latency_s=0.2", "ray.batch_size=1", "ray.batches_in_flight=1",
                "ray.actors=[1, 4]"]  # fmt: skip
    code, said = planned(capsys, "--input", corpus, "--output", tmp_path / "out", "--images", "5", *settings)
    assert code == 0, said
    rate = float(said.split("images here: ")[1].split()[0])
    assert 0 < rate <= 5
    assert "the corpus with 1 engines" in said
    assert "the corpus with 4 engines" in said
    assert "GPU-hours" not in said
    assert "MiB at most" in said
    assert "bytes a row" in said


def test_every_failed_check_is_named(tmp_path, corpus, capsys):
    (tmp_path / "m.csv").write_text("image\n/etc/hostname\n../nothing.png\n")
    (tmp_path / "file").write_text("")
    settings = ["model.path=/no/such/model", "predictor.path=/no/such/predictor", "ray.num_gpus=64"]
    arguments = ["--input", tmp_path / "m.csv", "--output", tmp_path / "file", "--images", 4]
    code, said = planned(capsys, *arguments, "--set", "engine.kind=transformers", *settings)
    assert code == 2
    failed = [line for line in said.splitlines() if line.startswith("failed")]
    assert [line.split()[1] for line in failed] == ["corpus", "model", "predictor", "output", "cluster"]
    assert "access.roots" in failed[0]
    assert "/no/such/model" in failed[1]
    assert "/no/such/predictor" in failed[2]
    assert "ray.num_gpus=64" in failed[4]
    assert said.splitlines()[-1].startswith("5 of 5 checks failed: corpus, model")


def test_an_output_of_another_run_is_found_before_it_starts(tmp_path, corpus, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/letter.txt").write_text("mine")
    code, said = planned(capsys, "--input", corpus, "--output", tmp_path / "out", *SIMULATED)
    assert code == 2
    assert "failed  output" in said
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [(["ray.num_gpus=1.5"], "whole ones"), (["ray.num_gpus=1", "engine.tensor_parallel_size=2"], "in one actor"),
     (["ray.num_gpus=0.5"], "gpu_memory_utilization=0.45")],
)  # fmt: skip
def test_gpu_numbers_that_do_not_go_together(tmp_path, corpus, capsys, settings, said):
    code, out = planned(capsys, "--input", corpus, "--output", tmp_path / "out", "--set", *settings)
    assert code == 2
    assert said in out


@pytest.mark.parametrize(
    ("settings", "said"),
    [(["ray.decode_on=decode"], "ray.decode_on=decode: no node of the cluster has that resource"),
     (["ray.decode_cpus=4000"], "ray.decode_cpus=4000: no node of the cluster has more than"),
     (["engine.kind=vllm", "engine.tensor_parallel_size=4"], "ray.num_gpus=4: no node")],
)  # fmt: skip
def test_what_this_machine_lacks_is_found_without_a_cluster(tmp_path, corpus, capsys, monkeypatch, settings, said):
    monkeypatch.setattr(m3agiqa.plan, "gpu_memory", lambda: [0.0])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code, out = planned(capsys, "--input", corpus, "--output", tmp_path / "out", *SIMULATED, *settings)
    assert code == 2
    assert said in next(line for line in out.splitlines() if line.startswith("failed  cluster"))


def test_the_folder_of_another_is_left_where_it_is(tmp_path):
    (tmp_path / "there").mkdir()
    m3agiqa.plan._probe(Output(str(tmp_path / "there/a/b/c")))
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


@pytest.mark.slow
def test_the_real_engine_is_measured(tmp_path, corpus, capsys):
    arguments = ["--input", corpus, "--output", tmp_path / "out", "--images", 4]
    code, said = planned(capsys, *arguments, "--set", "engine.kind=transformers", "scoring.max_description_tokens=8")
    assert code == 0, said
    assert "4 images scored" in said
    assert "images/s for each engine" in said
