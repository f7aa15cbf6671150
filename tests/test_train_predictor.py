"""Training a predictor from captured sets, with real Ray Train and real processes that are killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m3agiqa.cli import main
from m3agiqa.errors import UserError
from m3agiqa.predictor import load as load_predictor
from m3agiqa.predictor.metrics import agreement
from m3agiqa.predictor.states import decode
from m3agiqa.seen import TRAIN
from m3agiqa.settings import load
from m3agiqa.train_config import TrainConfig
from m3agiqa.train_predictor import train_predictor
from m3agiqa.training_run import summary
from tests import captured_sets
from tests.captured_sets import SMALL, STATES_OF, rows, write
from tests.processes import descendants, title

ROOT = Path(__file__).parent.parent
QUALITY = {"quality": "mos_quality"}


def settings(*more):
    return load(TrainConfig, None, [*SMALL, *more])


def train(captured, out, *more, labels=QUALITY, **options):
    said = []
    config = settings(*more)
    inputs = [captured] if isinstance(captured, str) else captured
    return train_predictor(config, inputs, str(out), labels, say=said.append, **options), said


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    return write(tmp_path_factory.mktemp("captured") / "set", rows(120, prompts=60), first_answer="own")


@pytest.fixture
def quick(monkeypatch):
    """Ray Train looks at its workers more often than it would."""
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")


def bits(folder):
    return Path(folder, "predictor.safetensors").read_bytes()


@pytest.fixture(scope="module")
def trained(captured, tmp_path_factory, local_ray):
    out = tmp_path_factory.mktemp("trained") / "predictor"
    done, said = train(captured, out)
    return out, done, said


@pytest.mark.slow
def test_a_predictor_comes_out(captured, trained):
    out, done, said = trained
    predictor = load_predictor(out)
    fresh = rows(60, seed=9)
    states = [decode(row["quality_states"], row["quality_tokens"]) for row in fresh]
    found = predictor.predict_all(states)
    assert agreement(found, torch.tensor([row["mos_quality"] for row in fresh]))["srcc"] > 0.9
    assert predictor.calibration["quality"].level == 0.8
    assert predictor.scale == (0.0, 5.0)
    assert predictor.states_of == {k: v for k, v in STATES_OF.items() if k != "adapter.correspondence"}
    assert sorted(p.name for p in out.iterdir()) == [
        "predictor.json",
        "predictor.safetensors",
        "trained_on.parquet",
    ]
    assert predictor.trained_on.met("id", ["i0003", "never"]) == ["i0003"]
    assert predictor.trained_on.met("prompt", ["never", "i 7"]) == ["i 7"]
    ids = [f"i{i:04}" for i in range(120)]
    assert len(predictor.trained_on.met("id", ids, TRAIN)) == done["counts"]["train"]["images"]
    assert predictor.provenance["notes"] == done["notes"] == []
    assert predictor.provenance["first_answer"] == "own"
    beside = out.with_name("predictor.training")
    assert sorted(p.name for p in beside.iterdir()) == ["last", "tensorboard", "training.json"]
    assert json.loads((beside / "training.json").read_text()) == done
    assert done["counts"]["train"]["quality"] + done["counts"]["validation"]["quality"] < 120
    assert len(load_file(beside / "last" / "head.safetensors")) == len(predictor.head.state_dict())
    assert [line[:9] for line in said] == [f"epoch {i}/4" for i in range(1, 5)]
    assert any(line.startswith("quality interval at level 0.8: +/- 0.") for line in summary(done, str(out)))


@pytest.mark.slow
def test_tensorboard_has_every_epoch(trained):
    loader = pytest.importorskip("tensorboardX.record_writer")
    from tensorboardX.proto.event_pb2 import Event

    assert loader
    (file,) = (trained[0].with_name("predictor.training") / "tensorboard").iterdir()
    data, found, at = file.read_bytes(), [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        found.append(Event.FromString(data[at + 12 : at + 12 + size]))
        at += size + 16
    tags = {(value.tag, event.step) for event in found for value in event.summary.value}
    assert {("loss", i) for i in range(1, 5)} | {("quality/srcc", i) for i in range(1, 5)} <= tags


@pytest.mark.slow
def test_the_same_command_gives_the_same_bits(captured, trained, tmp_path):
    # The one keeps its states, the other reads them anew each epoch.
    train(captured, tmp_path / "again", "data.cache_mib=0")
    assert load_predictor(tmp_path / "again").calibration == load_predictor(trained[0]).calibration
    assert bits(tmp_path / "again") == bits(trained[0])


@pytest.mark.slow
def test_what_is_done_is_not_done_again(captured, trained):
    out, done, _ = trained
    before = bits(out)
    again, said = train(captured, out)
    assert again == done
    assert said == []
    assert bits(out) == before
    with pytest.raises(UserError, match="is there already"):
        train(captured, out, "optim.seed=4")


@pytest.mark.slow
def test_two_workers_with_two_aspects_and_a_validation_set(tmp_path, local_ray):
    aspects = ("quality", "correspondence")
    first = write(tmp_path / "a", rows(70, 1, aspects, prefix="a"), files=1, first_answer="own")
    second = write(tmp_path / "b", rows(50, 2, aspects, prefix="b"), files=3, first_answer="given")
    other = write(tmp_path / "v", rows(30, 3, aspects, prefix="a"), files=1, fingerprint="f1")
    made = {aspect: f"mos_{aspect}" for aspect in aspects}
    with pytest.raises(UserError, match="id a0000"):
        train([first, second], tmp_path / "p", labels=made, validation=[other])
    other = write(tmp_path / "w", [row | {"id": f"w{row['id']}"} for row in rows(30, 3, aspects, prefix="a")])
    done, said = train([first, second], tmp_path / "p", "ray.workers=2", labels=made, validation=[other])
    assert any(line.endswith("validation prompts are also trained on: scores flatter") for line in said)
    assert done["counts"]["validation"] == {"images": 30, "quality": 30, "correspondence": 30}
    best = done["epochs"][done["best_epoch"] - 1]["validation"]
    assert min(best[aspect]["srcc"] for aspect in aspects) > 0.9
    predictor = load_predictor(tmp_path / "p")
    assert predictor.outputs == aspects
    assert predictor.provenance["first_answer"] == "given and own"
    assert [line for line in said if "given in" in line] == [
        f"note: descriptions are the model's own in {first}, and given in {second}"
    ]
    assert predictor.provenance["notes"] == done["notes"] == [line[6:] for line in said if line.startswith("note: ")]


def kill_worker(beside, after_epochs):
    """Waits until some epochs are done, then kills a worker's process with no warning."""
    while len(json.loads((beside / "training.json").read_text())["epochs"]) < after_epochs:
        time.sleep(0.1)
    (worker,) = (pid for pid in descendants(os.getpid()) if "RayTrainWorker" in title(pid))
    os.kill(worker, signal.SIGKILL)
    return worker


@pytest.mark.slow
def test_a_killed_worker_is_made_good(captured, tmp_path, local_ray, quick):
    killed = []

    def watch():
        beside = tmp_path / "p.training"
        while not (beside / "training.json").exists():
            time.sleep(0.1)
        killed.append(kill_worker(beside, 2))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    more = ("optim.epochs=20", "optim.patience=20", "optim.learning_rate=0.001")
    done, said = train(captured, tmp_path / "p", *more)
    thread.join(timeout=10)
    assert killed
    assert [record["epoch"] for record in done["epochs"]] == list(range(1, 21))
    assert len(said) == len(set(said)) == 20
    # As if nothing had happened: an epoch that was cut short is begun again from the end of the one before.
    undisturbed, _ = train(captured, tmp_path / "whole", *more)
    assert bits(tmp_path / "p") == bits(tmp_path / "whole")
    for name in ("best_epoch", "calibration"):
        assert done[name] == undisturbed[name]
    assert measured(done) == measured(undisturbed)


def measured(done):
    """What the epochs came to, without how long they took."""
    return [{key: value for key, value in one.items() if not key.endswith("seconds")} for one in done["epochs"]]


COMMAND = ["train-predictor", "--label", "quality=mos_quality", "--set", *SMALL]


@pytest.mark.slow
def test_after_the_driver_is_killed_the_same_command_goes_on(captured, tmp_path, local_ray, capsys):
    more = ["optim.epochs=30", "optim.patience=30", "optim.learning_rate=0.001"]
    command = [*COMMAND, *more, "--input", captured]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3"}
    environment.pop("RAY_ADDRESS", None)
    program = "import sys; from m3agiqa.cli import main; sys.exit(main(sys.argv[1:]))"
    driver = subprocess.Popen(
        [sys.executable, "-c", program, *command, "--out", str(tmp_path / "p")],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    lines = []
    for line in driver.stdout:
        lines.append(line)
        if line.startswith("epoch  3/"):
            driver.kill()
            break
    assert driver.wait() == -signal.SIGKILL, lines
    assert not (tmp_path / "p").exists()
    assert main([*command, "--out", str(tmp_path / "p")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("going on after epoch ")
    assert int(said[0].split()[-1]) >= 3
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    assert bits(tmp_path / "p") == bits(tmp_path / "whole")


def without(made, *names):
    return [{key: value for key, value in row.items() if key not in names} for row in made]


def changed(made, **values):
    return [made[0] | values, *made[1:]]


def all_with(made, **values):
    return [row | values for row in made]


BAD = [
    (lambda r: r, {"quality": "mos_qualty"}, "has no column mos_qualty; did you mean mos_quality"),
    (lambda r: r, {"correspondence": "mos_quality"}, "holds no states of correspondence"),
    (lambda r: changed(r, mos_quality=float("nan")), QUALITY, "1 labels are NaN"),
    (lambda r: changed(r, mos_quality=5.5), QUALITY, "1 labels, such as 5.5, are outside the scale 0 to 5"),
    (lambda r: [x | {"mos_quality": str(x["mos_quality"])} for x in r], QUALITY, "holds string, not numbers"),
    (lambda r: all_with(r, mos_quality=3.0), QUALITY, "all 60 labels are 3"),
    (lambda r: [*r, r[0]], QUALITY, "id i0000: is there twice"),
    (lambda r: r[:9], QUALITY, "9 images have it and states; give at least 10"),
    (lambda r: r[:20], QUALITY, "held-out labels of quality are too few for intervals at level 0.8, which need 4"),
    (lambda r: all_with(r, prompt="one"), QUALITY, "the training part: holds no labels of quality"),
    (lambda r: all_with(r, status="rejected"), QUALITY, "0 images have it and states"),
    (lambda r: changed(r, quality_states=b"abc"), QUALITY, "states of 3 bytes are not"),
]


@pytest.mark.parametrize(("change", "labels", "said"), BAD)
def test_bad_input_is_one_clear_line_and_leaves_nothing(tmp_path, change, labels, said):
    folder = write(tmp_path / "set", change(rows(60)), files=1)
    with pytest.raises(UserError, match=said) as caught:
        train(folder, tmp_path / "p", labels=labels)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_sets_must_fit_together(tmp_path):
    first = write(tmp_path / "a", rows(40))
    other = write(tmp_path / "b", rows(40, prefix="b"), STATES_OF | {"base": "x", "adapter.correspondence": "y"})
    with pytest.raises(UserError, match=r"\(base differs\)"):
        train([first, other], tmp_path / "p")
    narrow = write(tmp_path / "c", rows(40, width=10, prefix="c"))
    with pytest.raises(UserError, match=f"different widths: {captured_sets.WIDTH} in .*, 10 in"):
        train([first, narrow], tmp_path / "p")
    with pytest.raises(UserError, match="given twice"):
        train([first, first], tmp_path / "p")
    (tmp_path / "d").mkdir()
    for folder, said in ((tmp_path / "d", "no captured set"), (tmp_path / "none", "is no folder")):
        with pytest.raises(UserError, match=said):
            train(str(folder), tmp_path / "p")
    unfinished = write(tmp_path / "e", rows(40), finished=None)
    with pytest.raises(UserError, match="has not finished"):
        train(unfinished, tmp_path / "p")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["ray.workers=3"], "optim.batch_size=16: is no multiple of the 3 workers"),
        (["track.to=wandb"], "needs the package wandb"),
        (["head.width=30"], "no multiple of 4 heads"),
        (["head.blocks=1"], "names a block beyond the 1 there are"),
        (["data.split_by=split"], "60 images have the value None in the column split"),
    ],
)
def test_a_bad_configuration_is_refused_before_any_work(tmp_path, more, said):
    folder = write(tmp_path / "set", rows(60))
    with pytest.raises(UserError, match=said):
        train(folder, tmp_path / "p", *more)
    with pytest.raises(UserError, match="does not go up"):
        train(folder, tmp_path / "p", scale=(5.0, 0.0))
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_validation_sets_without_a_label_are_refused(tmp_path):
    sets = [write(tmp_path / "a", rows(60)), write(tmp_path / "b", all_with(rows(9, prefix="b"), status="failed"))]
    for more in ((), ("data.split_by=split",)):
        with pytest.raises(UserError, match=f"--validation {sets[1]}: no image has a label of quality with states"):
            train(sets[0], tmp_path / "p", *more, validation=[sets[1]])


def test_the_command_line_says_what_is_wrong_with_a_label(capsys):
    base = ["train-predictor", "--input", "x", "--out", "y", "--label"]
    for label, said in (("quality", "not of the form"), ("beauty=x", "no aspect"), ("quality=a quality=b", "twice")):
        assert main([*base, *label.split()]) == 2
        assert said in capsys.readouterr().err


def test_the_configuration_is_explained_and_shipped(capsys):
    assert main(["config", "--docs", "--kind", "train-predictor"]) == 0
    assert "learning_rate: 0.0003  # " in capsys.readouterr().out
    assert load(TrainConfig, ROOT / "configs" / "train_predictor.yaml") != TrainConfig()
    with pytest.raises(UserError, match=r"did you mean optim.epochs"):
        load(TrainConfig, None, ["optim.epoch=3"])


def test_other_trackers_get_every_epoch(monkeypatch, tmp_path):
    import types

    from m3agiqa.tracking import open_trackers

    calls = []

    def call(name):
        return lambda *args, **kwargs: calls.append((name, args, kwargs))

    names = ("set_experiment", "start_run", "log_params", "log_metrics", "end_run")
    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace(**{name: call(name) for name in names}))
    run = types.SimpleNamespace(log=call("wandb.log"), finish=call("finish"))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **kwargs: run))
    for tracker in open_trackers(tmp_path, ("mlflow", "wandb"), "project", "name", {"optim": {"seed": 1}}):
        tracker.log(3, {"loss": 0.5})
        tracker.close()
    assert ("log_params", ({"optim.seed": 1},), {}) in calls
    assert ("log_metrics", ({"loss": 0.5},), {"step": 3}) in calls
    assert ("wandb.log", ({"loss": 0.5},), {"step": 3}) in calls
    assert ("end_run", (), {}) in calls


def test_a_checkpoint_that_is_not_whole_is_not_gone_on_from(tmp_path):
    from m3agiqa.training_run import TrainingRun

    run = TrainingRun(tmp_path / "p", {"x": 1}, {}, [], [], "predictor.json")
    for steps, name in ((1, "1/a"), (2, "1/b"), (3, "2/c"), (4, "2/d")):
        folder = Path(run.storage(None), name)
        folder.mkdir(parents=True)
        (folder / "head.safetensors").write_bytes(bytes(steps if steps != 3 else 1))
        progress = json.dumps({"step": steps, "sizes": {"head.safetensors": steps}})
        (folder / "progress.json").write_text(progress if steps != 4 else progress[:9])
    store, copy = run.begun(None)
    assert json.loads(Path(copy, "progress.json").read_text())["step"] == 2
    assert "/begun/2-" in copy
    assert store is not None
    run.forget_checkpoints(None)
    assert run.begun(None) is None
