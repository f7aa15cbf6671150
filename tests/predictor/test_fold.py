import json

import pytest
import torch
from safetensors.torch import load_file, save_file

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


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model's folder, its states at real tokens, and the logits that it makes of them."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    folder = write_random_model(tmp_path_factory.mktemp("random") / "model")
    ids = AutoTokenizer.from_pretrained(folder)("ban den fen gor bi do fu ka le mi, no pa ru.", return_tensors="pt")
    network = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        out = network(input_ids=ids["input_ids"], output_hidden_states=True)
    assert len(set(ids["input_ids"][0].tolist())) > 10
    return folder, out.hidden_states[-1][0], out.logits[0]


@pytest.mark.parametrize("wrong", ["scale", "weight"])
def test_a_wrong_fold_is_noticed_on_real_tokens(model, wrong):
    folder, states, _ = model
    head = LMHead.load(folder)
    vocabulary = len(head.weight)
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(WIDTH, vocabulary, generator=generator), torch.randn(WIDTH, generator=generator)
    other = LMHead(head.weight, scale=1.01) if wrong == "scale" else LMHead(head.weight.roll(1, 0))
    assert folding_error(fold(weight, bias, other), weight, bias, head, states) > 100 * TOLERANCE
    assert folding_error(fold(weight, bias, head), weight, bias, head, states) < TOLERANCE


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


def test_the_head_of_a_checkpoint_gives_its_logits(model):
    folder, states, logits = model
    assert torch.allclose(LMHead.load(folder).logits(states), logits, atol=1e-5)


def scaling_model(kind, folder, **settings):
    """A folder of a small language model that scales its logits, its states and its logits."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(config).eval()
    network.save_pretrained(folder)
    with torch.inference_mode():
        out = network(torch.arange(3, 90)[None], output_hidden_states=True)
    return folder, out.hidden_states[-1][0], out.logits[0]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Cohere", {"logit_scale": 0.3}),
        ("Granite", {"logits_scaling": 4.0}),
        ("HyperCLOVAX", {"logits_scaling": 4.0}),
        ("Gemma2", {"final_logit_softcapping": 0.5}),
        ("MiniCPM3", {"dim_model_base": 32}),
    ],
)
def test_the_head_of_a_model_that_scales_gives_its_logits(tmp_path, kind, settings):
    folder, states, logits = scaling_model(kind, tmp_path, **settings)
    head = LMHead.load(folder)
    assert torch.allclose(head.logits(states), logits, atol=1e-6)
    if "dim_model_base" not in settings:
        assert not torch.allclose(LMHead(head.weight).logits(states), logits, atol=1e-2)


def test_a_head_whose_states_are_scaled_before_it_is_refused(tmp_path):
    folder, states, logits = scaling_model("MiniCPM3", tmp_path / "model", dim_model_base=16)
    with pytest.raises(UserError, match=r"dim_model_base=16.*train a predictor on the model's states") as caught:
        LMHead.load(folder)
    assert "\n" not in str(caught.value)
    # What would have been folded.
    (weight,) = (tensor for name, tensor in load_file(folder / "model.safetensors").items() if "embed_tokens" in name)
    assert torch.allclose(LMHead(weight).logits(states), 2 * logits, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lm_head_multiplier": 0.5}, r"lm_head_multiplier=0\.5"),
        ({"text_config": {"output_multiplier": 0.25}}, r"output_multiplier=0\.25"),
        ({"logits_soft_cap": 30.0, "mup_width_scale": 0.1}, r"logits_soft_cap=30\.0, mup_width_scale=0\.1"),
        ({"logit_scale": "inv_sqrt_d_model"}, "logit_scale=inv_sqrt_d_model"),
        ({"lm_head_multiplier": 1.0, "logits_soft_cap": None, "dim_model_base": HIDDEN, "hidden_size": HIDDEN}, None),
    ],
)
def test_other_ways_to_scale_logits_are_refused(tmp_path, parts, settings, said):
    save_file({"lm_head.weight": parts[2]}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    if said is None:
        assert LMHead.load(tmp_path).scale == 1
        return
    with pytest.raises(UserError, match=said):
        LMHead.load(tmp_path)


def test_a_head_with_bias_in_a_file_of_its_own(tmp_path, parts):
    _, _, head_weight, head_bias, states = parts
    save_file({"lm_head.weight": head_weight, "lm_head.bias": head_bias}, tmp_path / "head.safetensors")
    head = LMHead.load(tmp_path / "head.safetensors")
    assert torch.equal(head.logits(states), LMHead(head_weight, head_bias).logits(states))
    save_file({"other": head_weight}, tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="LM head"):
        LMHead.load(tmp_path / "none.safetensors")
