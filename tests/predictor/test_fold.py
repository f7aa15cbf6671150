import pytest
import torch
from safetensors.torch import save_file

from m3agiqa.errors import UserError
from m3agiqa.predictor.fold import TOLERANCE, Folded, LongWay, NotFoldable, fold, folding_error, project
from m3agiqa.predictor.lm_head import LMHead
from m3agiqa.tiny.architecture import write_random_model

WIDTH, VOCABULARY, HIDDEN, TOKENS = 24, 20_000, 48, 33


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weight, bias = draw(WIDTH, VOCABULARY) / VOCABULARY**0.5, draw(WIDTH)
    return weight, bias, draw(VOCABULARY, HIDDEN), draw(VOCABULARY), draw(TOKENS, HIDDEN)


def long_way(weight, bias, head, states):
    """In float64, with the logits written out: the definition."""
    logits = head.scale * (states.double() @ head.weight.double().T)
    if head.bias is not None:
        logits = logits + head.scale * head.bias.double()
    if head.soft_cap is not None:
        logits = head.soft_cap * torch.tanh(logits / head.soft_cap)
    return logits @ weight.double().T + (0 if bias is None else bias.double())


@pytest.mark.parametrize("scale", [1.0, 0.0625])
@pytest.mark.parametrize("with_biases", [False, True])
def test_folding_bias_and_scale_is_exact(parts, scale, with_biases):
    weight, bias, head_weight, head_bias, states = parts
    bias, head_bias = (bias, head_bias) if with_biases else (None, None)
    head = LMHead(head_weight, head_bias, scale)
    exact = long_way(weight, bias, head, states)
    folded = fold(weight, bias, head)
    assert ((folded(states) - exact).abs().max() / exact.abs().max()).item() < 1e-6
    assert folding_error(folded, weight, bias, head, states) < TOLERANCE
    assert isinstance(project(weight, bias, head, states), Folded)


def test_a_soft_cap_is_refused_and_the_long_way_is_right(parts):
    weight, bias, head_weight, head_bias, states = parts
    head = LMHead(head_weight, head_bias, soft_cap=30.0)
    with pytest.raises(NotFoldable, match="30"):
        fold(weight, bias, head)
    layer = project(weight, bias, head, states)
    assert isinstance(layer, LongWay)
    exact = long_way(weight, bias, head, states)
    assert ((layer(states) - exact).abs().max() / exact.abs().max()).item() < 1e-5


def test_a_wrong_fold_is_noticed_on_real_tokens(parts):
    weight, bias, head_weight, _, states = parts
    head = LMHead(head_weight)
    folded = fold(weight, bias, LMHead(head_weight, scale=1.01))
    assert folding_error(folded, weight, bias, head, states) > 100 * TOLERANCE


def test_folding_is_more_exact_than_the_long_way_in_bfloat16(parts):
    weight, bias, head_weight, _, states = parts
    exact = long_way(weight, bias, LMHead(head_weight), states)
    low = [t.bfloat16() for t in (weight, bias, head_weight, states)]
    # The published way: logits in bfloat16, then the layer on them.
    logits = low[3] @ low[2].T
    long = logits @ low[0].T + low[1]
    short = fold(weight, bias, LMHead(head_weight)).bfloat16()(low[3])
    assert (short - exact).abs().mean() < (long - exact).abs().mean()


def test_another_vocabulary_is_refused(parts):
    weight, bias, head_weight, _, _ = parts
    with pytest.raises(ValueError, match=r"20000 logits.*19999"):
        fold(weight, bias, LMHead(head_weight[1:]))


def test_the_head_of_a_checkpoint_gives_its_logits(tmp_path):
    from transformers import AutoModelForImageTextToText

    folder = write_random_model(tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(20, 60)[None]
    with torch.inference_mode():
        out = model(input_ids=ids, output_hidden_states=True)
    head = LMHead.load(folder)
    assert torch.allclose(head.logits(out.hidden_states[-1]), out.logits, atol=1e-5)


def test_a_head_with_bias_in_a_file_of_its_own(tmp_path, parts):
    _, _, head_weight, head_bias, states = parts
    save_file({"lm_head.weight": head_weight, "lm_head.bias": head_bias}, tmp_path / "head.safetensors")
    head = LMHead.load(tmp_path / "head.safetensors")
    assert torch.equal(head.logits(states), LMHead(head_weight, head_bias).logits(states))
    save_file({"other": head_weight}, tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="LM head"):
        LMHead.load(tmp_path / "none.safetensors")
