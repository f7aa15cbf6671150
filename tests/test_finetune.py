"""Fine-tuning by the command, with real Ray Train, real engines and real processes that are killed."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.dataset
import pytest
from safetensors.torch import load_file

from m3agiqa import seen
from m3agiqa.adapters import load_adapters
from m3agiqa.aspects import Aspect
from m3agiqa.cli import main
from m3agiqa.errors import UserError
from m3agiqa.finetune import finetune
from m3agiqa.finetune_config import FinetuneConfig
from m3agiqa.finetuning.talks import Columns
from m3agiqa.models import model_digest
from m3agiqa.settings import load
from tests.finetuning.helpers import FAST, rows, settings, write, write_model
from tests.processes import descendants, title

ROOT = Path(__file__).parent.parent
LABEL = Columns(labels={Aspect.QUALITY: "mos_quality"})
HEART = ("optim.epochs=40", "optim.batch_size=6", "optim.micro_batch=6", "optim.learning_rate=0.006")
"""Settings under which a handful of conversations is learnt by heart."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write(tmp_path_factory.mktemp("corpus"), rows(10))


@pytest.fixture
def quick(monkeypatch):
    """Ray Train looks at its workers more often than it would."""
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")


def tune(model, corpus, out, *more, **options):
    said = []
    options = {"columns": LABEL} | options
    return finetune(settings(model, *more), [corpus], str(out), say=said.append, **options), said


def bits(folder):
    return Path(folder, "adapter_model.safetensors").read_bytes()


def scores(output):
    return {row["id"]: row for row in pyarrow.dataset.dataset(f"{output}/scores").to_table().to_pylist()}


@pytest.mark.slow
def test_the_taught_words_are_what_score_says(model, corpus, tmp_path, local_ray, capsys):
    out = str(tmp_path / "adapter")
    command = ["finetune", "--input", corpus, "--out", out, "--label", "quality=mos_quality", "--set", *FAST]
    assert main([*command, f"model.path={model}", *HEART, "proof.engine=vllm"]) == 0
    said = capsys.readouterr().out
    assert "vllm loaded it and scored 1 images with it: quality right " in said
    assert "conversations/s" in said
    assert f"'model.adapters={out}'" in said
    assert sorted(path.name for path in Path(out).iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "m3agiqa.json", "trained_on.parquet",
    ]  # fmt: skip
    card = Path(out, "README.md").read_text()
    assert model_digest(model) in card
    assert f"- `{Path(corpus).parent.name}/corpus.csv`" in card
    assert corpus not in card
    assert "learning_rate: 0.006" in card
    training = json.loads(Path(f"{out}.training/training.json").read_text())
    trained = set(training["counts"]["train"])
    assert trained == {"images", "quality", "authenticity"}
    options = [f"model.path={model}", f"model.adapters={Path(out).parent}/adapter.training/last"]
    options += ["model.dtype=float32", "scoring.aspects=quality,authenticity", "scoring.max_description_tokens=12"]
    taught = {row["id"]: row for row in rows(10)}
    for engine in ("transformers", "vllm"):
        output = str(tmp_path / engine)
        command = ["score", "--input", corpus, "--output", output, "--set", *options, f"engine.kind={engine}"]
        assert main(command) == 0
        right = 0
        for key, row in scores(output).items():
            for aspect in ("quality", "authenticity"):
                right += (row[f"{aspect}_description"], row[f"{aspect}_rating"]) == (
                    taught[key][f"teacher_{aspect}_description"], taught[key][f"teacher_{aspect}_rating"],
                )  # fmt: skip
        # One image of the ten was held out.
        assert right >= 16


@pytest.fixture(scope="module")
def undisturbed(model, corpus, tmp_path_factory, local_ray):
    out = tmp_path_factory.mktemp("undisturbed") / "adapter"
    done, said = tune(model, corpus, out, *LONG)
    return out, done[str(out)], said


LONG = (
    "optim.epochs=5",
    "watch.checkpoint_steps=2",
    "watch.log_steps=2",
    "lora.dropout=0.2",
    "optim.learning_rate=0.003",
)
"""Settings of a training that there is time to kill."""


@pytest.mark.slow
def test_best_and_last_are_kept_and_told_of(model, corpus, undisturbed):
    out, done, said = undisturbed
    beside = out.with_name("adapter.training")
    assert sorted(path.name for path in beside.iterdir()) == ["last", "tensorboard", "training.json"]
    assert json.loads((beside / "training.json").read_text()) == done
    steps = [record["step"] for record in done["records"] if "loss" in record]
    assert steps[-1] == done["records"][-1]["step"]
    judged = [record for record in done["records"] if "validation" in record]
    assert len(judged) == 5
    best = min(judged, key=lambda record: sum(one["loss"] for one in record["validation"].values()))
    assert done["best_step"] == best["step"]
    assert (bits(out) == bits(beside / "last")) == (best is judged[-1])
    assert set(load_adapters(str(out), model)) == set(Aspect)
    pictures = Path(corpus).parent
    digests = [hashlib.sha256((pictures / f"{i}.png").read_bytes()).hexdigest() for i in range(10)]
    ids = [f"r{i}" for i in range(10)]
    for folder in (out, beside / "last"):
        met = seen.read(folder)
        for part, count in ((seen.TRAIN, 9), (seen.VALIDATION, 1)):
            assert [int(one[1:]) for one in met.met("id", ids, part)] == [
                digests.index(one) for one in met.met("image", digests, part)
            ]
            assert len(met.met("id", ids, part)) == count
    assert done["proof"]["images"] == 1
    assert sum("conversations/s" in line for line in said) == len(steps)
    again, silent = tune(model, corpus, out, *LONG)
    assert again[str(out)] == done
    assert silent == []
    with pytest.raises(UserError, match="is there already"):
        tune(model, corpus, out, *LONG, "optim.seed=3")


def when_steps(beside, steps, act):
    """Waits in a thread until so many steps are told of, then acts."""

    def watch():
        while True:
            file = beside / "training.json"
            records = json.loads(file.read_text())["records"] if file.exists() else []
            if records and records[-1]["step"] >= steps:
                return act()
            time.sleep(0.05)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_a_killed_worker_is_made_good_to_the_bit(model, corpus, undisturbed, tmp_path, quick):
    killed = []

    def kill():
        (worker,) = (pid for pid in descendants(os.getpid()) if "RayTrainWorker" in title(pid))
        os.kill(worker, signal.SIGKILL)
        killed.append(worker)

    thread = when_steps(tmp_path / "a.training", 8, kill)
    done, said = tune(model, corpus, tmp_path / "a", *LONG)
    thread.join(timeout=10)
    assert killed
    assert bits(tmp_path / "a") == bits(undisturbed[0])
    assert untimed(done[str(tmp_path / "a")]["records"]) == untimed(undisturbed[1]["records"])
    lines = [line for line in said if line.startswith("step ")]
    assert len({line.split("  ")[0] for line in lines}) == len(lines)


def untimed(records):
    return [{key: value for key, value in record.items() if key != "conversations_per_second"} for record in records]


@pytest.mark.slow
def test_after_the_driver_is_killed_the_same_command_goes_on_to_the_bit(model, corpus, undisturbed, tmp_path, capsys):
    command = ["finetune", "--input", corpus, "--out", str(tmp_path / "a"), "--label", "quality=mos_quality"]
    command += ["--set", *FAST, f"model.path={model}", *LONG]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3"}
    environment.pop("RAY_ADDRESS", None)
    program = "import sys; from m3agiqa.cli import main; sys.exit(main(sys.argv[1:]))"
    driver = subprocess.Popen(
        [sys.executable, "-c", program, *command],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    lines = []
    for line in driver.stdout:
        lines.append(line)
        if line.startswith("step 8 "):
            driver.kill()
            break
    assert driver.wait() == -signal.SIGKILL, lines
    assert not (tmp_path / "a").exists()
    assert main(command) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("going on after step ")
    assert int(said[0].split()[-1]) >= 6
    assert any("transformers loaded it and scored 1 images with it: " in line for line in said)
    assert bits(tmp_path / "a") == bits(undisturbed[0])


WHOLE = (
    "optim.batch_size=20",
    "optim.micro_batch=3",
    "optim.epochs=20",
    "optim.learning_rate=0.0005",
    "data.validation_share=0.2",
)
"""A step is over all conversations, so that it does not matter which worker has which."""


@pytest.fixture(scope="module")
def by_one_worker(model, corpus, tmp_path_factory, local_ray):
    out = tmp_path_factory.mktemp("one") / "one"
    tune(model, corpus, out, *WHOLE)
    return load_file(out.with_name("one.training") / "last" / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_workers_learn_what_one_does(model, corpus, by_one_worker, tmp_path, quick, parallel):
    more = ("ray.workers=2", f"compute.parallel={parallel}", "watch.checkpoint_steps=1", "watch.log_steps=1")
    killed = []

    def kill():
        os.kill(next(pid for pid in descendants(os.getpid()) if "RayTrainWorker" in title(pid)), signal.SIGKILL)
        killed.append(True)

    thread = when_steps(tmp_path / "two.training", 3, kill)
    done, _ = tune(model, corpus, tmp_path / "two", *WHOLE, *more)
    thread.join(timeout=10)
    assert killed
    assert done[str(tmp_path / "two")]["records"][-1]["step"] == 20
    two = load_file(tmp_path / "two.training/last/adapter_model.safetensors")
    assert set(by_one_worker) == set(two)
    for name, value in by_one_worker.items():
        assert float((two[name] - value).norm()) < 0.02 * float(value.norm())


@pytest.mark.slow
def test_an_adapter_for_each_aspect(model, corpus, tmp_path, local_ray):
    done, said = tune(model, corpus, tmp_path / "a", "lora.adapters=per_aspect", "optim.epochs=1")
    folders = {aspect: tmp_path / "a" / aspect for aspect in ("quality", "authenticity")}
    assert list(done) == list(map(str, folders.values()))
    assert [set(one["counts"]["train"]) for one in done.values()] == [{"images", aspect} for aspect in folders]
    loaded = load_adapters({aspect: str(folder) for aspect, folder in folders.items()}, model)
    assert loaded[Aspect.QUALITY].digest != loaded[Aspect.AUTHENTICITY].digest
    assert "quality:" in said


@pytest.mark.slow
def test_bad_images_are_named_before_any_step_and_skipped_if_wanted(model, tmp_path, local_ray):
    made = rows(10)
    file = Path(write(tmp_path / "c", made))
    (file.parent / "2.png").unlink()
    (file.parent / "5.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"2 rows cannot be trained on: row 2 \(id r2\): there is no such file"):
        tune(model, str(file), tmp_path / "a", "optim.epochs=1")
    assert json.loads((tmp_path / "a.training" / "training.json").read_text())["records"] == []
    done, said = tune(model, str(file), tmp_path / "b", "optim.epochs=1", skip_bad=True)
    assert any(line.startswith("note: skipped row 2 (id r2): there is no such file") for line in said)
    assert any(line.startswith("note: skipped row 5 (id r5): ") for line in said)
    assert done[str(tmp_path / "b")]["finished"]


def test_bad_rows_cost_nothing(tmp_path, capsys):
    made = rows(4)
    made[1]["teacher_quality_rating"] = "great"
    made[3]["teacher_quality_description"] = ""
    file = write(tmp_path / "c", made, pictures=False)
    assert main(["finetune", "--input", file, "--out", str(tmp_path / "a"), "--set", *FAST]) == 2
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2][:13] for line in told[:2]] == ["row 1 (id r1)", "row 3 (id r3)"]
    assert told[2].startswith("m3agiqa: 2 rows cannot be trained on: row 1 (id r1): quality: the rating 'great'")
    assert told[2].endswith("mend them, or leave them out with --skip-bad")
    assert len(told) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["ray.workers=3"], "is no multiple of the 3 workers"),
        (["compute.parallel=fsdp"], "raise ray.workers"),
        (["model.adapters=x"], "merge the old one"),
        (["corpus.text_only=true", "lora.vision=true"], "lora.connector learn nothing"),
        (["data.split_by=split"], r"row 0 \(id r0\) has the value None in the column split"),
        (["data.conversation=v9"], "is none of published, v1"),
        (["lora.rnk=3"], "did you mean lora.rank"),
        (["model.path=./nowhere"], "is no folder"),
    ],
)
def test_a_bad_configuration_is_refused_before_any_work(tmp_path, more, said):
    file = write(tmp_path / "c", rows(10), pictures=False)
    with pytest.raises(UserError, match=said):
        tune("tiny", file, tmp_path / "a", *more)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_the_command_line_says_what_is_wrong(tmp_path, capsys):
    file = write(tmp_path / "c", rows(3), pictures=False)
    base = ["finetune", "--input", file, "--out", str(tmp_path / "a"), "--set", *FAST]
    for flags, said in (
        (["--label", "quality"], "not of the form"),
        (["--rating", "beauty=x"], "no aspect"),
        (["--description", "quality=a", "quality=b"], "twice"),
        (["--scale", "5", "0"], "does not go up"),
        (["--input", file], "is given twice"),
    ):
        assert main([*base, *flags]) == 2
        assert said in capsys.readouterr().err


def test_the_configuration_is_explained_and_shipped(capsys):
    assert main(["config", "--docs", "--kind", "finetune"]) == 0
    docs = capsys.readouterr().out
    for section, field in FinetuneConfig.model_fields.items():
        assert field.annotation.__doc__, section
        for key, info in field.annotation.model_fields.items():
            assert info.description, f"{section}.{key}"
            assert f"  {key}: " in docs
    for name in ("finetune.yaml", "tiny_adapter.yaml"):
        assert load(FinetuneConfig, ROOT / "configs" / name) != FinetuneConfig()
