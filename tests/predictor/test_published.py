import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from m3agiqa.cli import main
from m3agiqa.errors import UserError
from m3agiqa.predictor import load
from m3agiqa.predictor.lm_head import LMHead
from m3agiqa.predictor.published import import_predictor
from tests.predictor.reference import Reference

VOCABULARY, HIDDEN = 400, 24


@pytest.fixture
def reference():
    return Reference(inputs=VOCABULARY, blocks=3)


@pytest.fixture
def logits():
    torch.manual_seed(2)
    return torch.randn(2, 40, VOCABULARY), torch.tensor([40, 40])


def write(reference, path, layout="cuda", change=lambda state: None):
    data = reference.lightning(layout)
    change(data["state_dict"])
    torch.save(data, path)
    return path


@pytest.mark.parametrize("layout", ["cuda", "vanilla"])
def test_it_predicts_what_the_checkpoint_does(tmp_path, reference, logits, layout):
    def with_the_model(state):
        state["model.model.base_model.model.llm.embed_tokens.weight"] = torch.zeros(3, 3)

    checkpoint = write(reference, tmp_path / "best.ckpt", layout, with_the_model)
    import_predictor(checkpoint, tmp_path / "out")
    predictor = load(tmp_path / "out")
    with torch.inference_mode():
        expected = reference(logits[0])[:, 0]
    assert (predictor.predict(*logits, clip=False) - expected).abs().max().item() < 1e-5
    assert predictor.head.config.takes == "logits"
    assert predictor.head.config.blocks == 3
    assert predictor.head.config.ffn_factor == 1.3
    assert predictor.provenance["slstm_layout"] == layout
    assert predictor.states_of == {}


def test_the_layouts_differ_where_shapes_do_not_tell(reference):
    name = "model.xlstm_pooler.xlstm_stack.blocks.1.xlstm.slstm_cell._bias_"
    cuda, vanilla = (reference.lightning(layout)["state_dict"][name] for layout in ("cuda", "vanilla"))
    assert cuda.shape == vanilla.shape
    assert not torch.allclose(cuda, vanilla)


def test_half_precision_becomes_float32(tmp_path, reference):
    def halve(state):
        state |= {name: value.half() for name, value in state.items()}

    import_predictor(write(reference, tmp_path / "c.ckpt", change=halve), tmp_path / "out")
    assert {value.dtype for value in load(tmp_path / "out").head.state_dict().values()} == {torch.float32}


def head_file(tmp_path, vocabulary=VOCABULARY):
    torch.manual_seed(3)
    lm_head = LMHead(torch.randn(vocabulary, HIDDEN), torch.randn(vocabulary))
    save_file({"lm_head.weight": lm_head.weight, "lm_head.bias": lm_head.bias}, tmp_path / "lm.safetensors")
    return lm_head, str(tmp_path / "lm.safetensors")


def test_folded_onto_an_lm_head_by_the_command_line(tmp_path, reference, capsys):
    lm_head, file = head_file(tmp_path)
    checkpoint = write(reference, tmp_path / "best.ckpt")
    out = str(tmp_path / "out")
    assert main(["import-predictor", str(checkpoint), "--out", out, "--lm-head", file, "--aspect", "authenticity"]) == 0
    assert f"takes states of {HIDDEN} numbers" in capsys.readouterr().out
    predictor = load(out)
    assert predictor.outputs == ("authenticity",)
    assert predictor.provenance["lm_head_is"] == "folded"
    states = torch.randn(3, 30, HIDDEN)
    found = predictor.predict(states, torch.tensor([30, 30, 30]), clip=False)
    with torch.inference_mode():
        expected = reference(lm_head.logits(states))[:, 0]
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-5
    assert main(["import-predictor", str(checkpoint), "--out", out]) == 2
    assert "not empty" in capsys.readouterr().err


def test_an_lm_head_with_a_soft_cap_goes_along(tmp_path, reference):
    lm_head, _ = head_file(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"final_logit_softcapping": 10.0}))
    save_file({"lm_head.weight": lm_head.weight}, folder / "model.safetensors")
    checkpoint = write(reference, tmp_path / "c.ckpt")
    predictor = import_predictor(checkpoint, tmp_path / "out", lm_head=str(folder))
    assert "not exact" in predictor.provenance["lm_head_is"]
    states = torch.randn(2, 30, HIDDEN)
    found = load(tmp_path / "out").predict(states, torch.tensor([30, 30]), clip=False)
    with torch.inference_mode():
        expected = reference(LMHead(lm_head.weight, soft_cap=10.0).logits(states))[:, 0]
    assert (found - expected).abs().max().item() < 1e-5


def test_an_lm_head_of_another_vocabulary_is_refused(tmp_path, reference):
    _, file = head_file(tmp_path, VOCABULARY - 1)
    with pytest.raises(UserError, match=r"399 logits.*400"):
        import_predictor(write(reference, tmp_path / "c.ckpt"), tmp_path / "out", lm_head=file)
    (tmp_path / "bad").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="not in safetensors"):
        import_predictor(tmp_path / "c.ckpt", tmp_path / "out", lm_head=str(tmp_path / "bad"))
    assert not (tmp_path / "out").exists()


STACK = "model.xlstm_pooler.xlstm_stack."


@pytest.mark.parametrize("key", ["model.W.weight", "model.fc.0.bias", f"{STACK}post_blocks_norm.weight"])
def test_missing_keys_are_named(tmp_path, reference, key):
    with pytest.raises(UserError, match=f"lacks {key}"):
        import_predictor(write(reference, tmp_path / "c", change=lambda state: state.pop(key)), tmp_path / "out")


@pytest.mark.parametrize("key", ["model.W.extra", "model.lstm.weight", "other", f"{STACK}blocks.0.more"])
def test_unexpected_keys_are_named(tmp_path, reference, key):
    def add(state):
        state[key] = torch.zeros(2)

    with pytest.raises(UserError, match=f"unexpected {key}"):
        import_predictor(write(reference, tmp_path / "c", change=add), tmp_path / "out")


@pytest.mark.parametrize(
    "key",
    [
        "model.W.weight",
        "model.fc.2.bias",
        f"{STACK}blocks.0.xlstm.proj_up.weight",
        f"{STACK}blocks.1.xlstm.slstm_cell._recurrent_kernel_",
        f"{STACK}blocks.1.xlstm.slstm_cell._bias_",
    ],
)
def test_misshaped_keys_are_named(tmp_path, reference, key):
    def reshape(state):
        state[key] = torch.zeros(5)

    with pytest.raises(UserError, match=rf"{key} (\[5\]|is \[5\])"):
        import_predictor(write(reference, tmp_path / "c", change=reshape), tmp_path / "out")


def test_a_missing_block_is_named(tmp_path, reference):
    def drop(state):
        for key in [key for key in state if ".blocks.0." in key]:
            del state[key]

    with pytest.raises(UserError, match=r"lacks model\.xlstm_pooler\.xlstm_stack\.blocks\.0"):
        import_predictor(write(reference, tmp_path / "c", change=drop), tmp_path / "out")


def test_aspects_must_be_as_many_as_outputs(tmp_path, reference):
    with pytest.raises(UserError, match="1 outputs"):
        import_predictor(write(reference, tmp_path / "c"), tmp_path / "out", outputs=("a", "b"))


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path, reference):
    data = reference.lightning()
    data["hyper_parameters"]["x"] = Malicious(str(tmp_path / "ran"))
    torch.save(data, tmp_path / "c.ckpt")
    with pytest.raises(UserError, match="more than weights") as caught:
        import_predictor(tmp_path / "c.ckpt", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1]), pickle.dumps({"state_dict": {"a": 1}})])
def test_what_is_no_checkpoint_is_one_clear_line(tmp_path, content):
    (tmp_path / "c.ckpt").write_bytes(content)
    with pytest.raises(UserError, match=r"c\.ckpt") as caught:
        import_predictor(tmp_path / "c.ckpt", tmp_path / "out")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="is no file"):
        import_predictor(tmp_path / "none.ckpt", tmp_path / "out")
