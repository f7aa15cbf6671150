import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from m3agiqa.errors import UserError
from m3agiqa.models import model_digest
from m3agiqa.predictor import Predictor, load
from m3agiqa.predictor.calibrate import Calibration
from m3agiqa.predictor.head import Head, HeadConfig
from m3agiqa.predictor.lm_head import LMHead
from m3agiqa.predictor.store import Affine

WIDTH = 12


def make(*outputs: str, **fields) -> Predictor:
    torch.manual_seed(0)
    config = HeadConfig(input_width=WIDTH, width=32, blocks=2, hidden=8, outputs=outputs or ("quality",))
    return Predictor(Head(config), **fields)


@pytest.fixture
def full():
    return make(
        "quality",
        "authenticity",
        affine={"quality": Affine(offset=2.5, factor=0.8)},
        calibration={"quality": Calibration(level=0.9, half_width=0.7, samples=50)},
        states_of={"base": "0123", "conversation": "v1"},
        provenance={"epochs": 3},
    )


@pytest.fixture
def sequences():
    torch.manual_seed(1)
    return [torch.randn(n, WIDTH) for n in (5, 1, 30, 5, 17)]


def test_it_comes_back_as_it_was(tmp_path, full, sequences):
    folder = full.save(tmp_path / "new" / "predictor")
    before = torch.get_rng_state()
    found = load(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found.predict_all(sequences), full.predict_all(sequences))
    for name in ("scale", "affine", "calibration", "states_of", "provenance", "outputs"):
        assert getattr(found, name) == getattr(full, name)
    assert sorted(p.name for p in folder.iterdir()) == ["predictor.json", "predictor.safetensors"]
    assert [p.name for p in folder.parent.iterdir()] == ["predictor"]
    assert model_digest(folder) == model_digest(found.save(tmp_path / "again"))


def test_a_stored_lm_head_comes_back_as_it_was(tmp_path):
    torch.manual_seed(0)
    wide = Head(HeadConfig(input_width=50, takes="logits", width=32, blocks=2))
    lm_head = LMHead(torch.randn(50, WIDTH).bfloat16(), None, 0.5, soft_cap=4.0)
    predictor = Predictor(wide.fold_onto(lm_head))
    found = load(predictor.save(tmp_path / "p"))
    states = torch.randn(2, 4, WIDTH)
    assert torch.equal(found.predict(states, torch.tensor([4, 2])), predictor.predict(states, torch.tensor([4, 2])))
    assert found.head.state_dict()["input.head_weight"].dtype == torch.bfloat16


def test_many_are_scored_in_order_whatever_the_batches(full, sequences):
    alone = torch.cat([full.predict(x[None], torch.tensor([len(x)])) for x in sequences])
    assert alone.shape == (5, 2)
    for tokens in (1, 12, 60, 10_000):
        assert torch.allclose(full.predict_all(sequences, tokens_per_batch=tokens), alone, atol=1e-5)
    assert full.predict_all([]).shape == (0, 2)
    assert make().predict_all(sequences).shape == (5,)
    with pytest.raises(ValueError, match="states 1 are"):
        full.predict_all([sequences[0], sequences[0][:0]])


def test_scores_are_on_the_scale(sequences):
    predictor = make(affine={"quality": Affine(offset=4.9, factor=9.0)})
    free = predictor.predict_all(sequences, clip=False)
    raw = torch.cat([predictor.head(x[None], torch.tensor([len(x)]))[:, 0] for x in sequences])
    assert torch.allclose(free, 4.9 + 9 * raw.detach(), atol=1e-5)
    assert torch.equal(predictor.predict_all(sequences), free.clamp(0, 5))
    assert not torch.equal(free, free.clamp(0, 5))


def test_intervals_end_where_the_scale_does(full):
    low, high = full.intervals(torch.tensor([[0.2, 1.0], [4.9, 1.0]]))
    assert torch.allclose(low[:, 0], torch.tensor([0.0, 4.2]))
    assert torch.allclose(high[:, 0], torch.tensor([0.9, 5.0]))
    assert low[:, 1].isnan().all()
    assert high[:, 1].isnan().all()
    assert make().intervals(torch.zeros(3)) is None
    one = make(calibration={"quality": Calibration(level=0.9, half_width=1, samples=9)})
    assert [end.tolist() for end in one.intervals(torch.tensor([3.0]))] == [[2.0], [4.0]]


def test_nothing_is_overwritten(tmp_path, full):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").touch()
    with pytest.raises(UserError, match="not empty"):
        full.save(tmp_path / "there")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
    full.provenance["bad"] = object()
    with pytest.raises(ValueError):
        full.save(tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_names_must_be_the_heads(full):
    with pytest.raises(ValueError, match="speed"):
        Predictor(full.head, affine={"speed": Affine()})
    with pytest.raises(ValueError, match="go up"):
        Predictor(full.head, scale=(5, 0))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "format 2.*reads 1"),
        ({"extra": 1}, "extra"),
        ({"affine": {}}, "affine lacks quality"),
        ({"scale": [5, 5]}, "scale"),
        ({"head": {"input_width": 0}}, "head.input_width"),
        ({"calibration": {"quality": {"level": 2, "half_width": 1, "samples": 3}}}, "calibration.quality.level"),
    ],
)
def test_a_wrong_description_is_one_clear_line(tmp_path, full, change, said):
    file = full.save(tmp_path / "p") / "predictor.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=said) as caught:
        load(tmp_path / "p")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["predictor.json", "predictor.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"\x80\x04."])
def test_a_broken_folder_is_one_clear_line(tmp_path, full, name, content):
    file = full.save(tmp_path / "p") / name
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(UserError, match=name):
        load(tmp_path / "p")


def test_wrong_tensors_are_named(tmp_path, full):
    file = full.save(tmp_path / "p") / "predictor.safetensors"
    tensors = load_file(file)
    del tensors["fc.2.bias"]
    tensors["more"] = torch.zeros(1)
    tensors["input.bias"] = torch.zeros(3)
    save_file(tensors, file)
    with pytest.raises(UserError) as caught:
        load(tmp_path / "p")
    for said in ("lacks fc.2.bias", "unexpected more", "input.bias [3] instead of [32]"):
        assert said in str(caught.value)


def test_lengths_are_checked(full):
    with pytest.raises(ValueError, match="length 4"):
        full.predict(torch.full((1, 3, WIDTH), math.nan), torch.tensor([4]))


def test_naming_the_package_loads_nothing_heavy():
    code = "import sys, m3agiqa.predictor as p, m3agiqa.cli; assert 'torch' not in sys.modules; p.load"
    subprocess.run([sys.executable, "-c", code], check=True)
