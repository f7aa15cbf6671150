import math
import subprocess
import sys

import pytest
import torch

from m3agiqa.predictor.fold import LongWay
from m3agiqa.predictor.head import Head, HeadConfig
from m3agiqa.predictor.lm_head import LMHead
from m3agiqa.predictor.store import build_head
from tests.predictor.reference import POOLS, Reference


def small(**changes) -> HeadConfig:
    return HeadConfig(**{"input_width": 20, "width": 32, "blocks": 2, "hidden": 16} | changes)


def twin(reference: Reference, config: HeadConfig) -> Head:
    return build_head(config, reference.ours(), "reference").eval()


def padded(sequences, fill=math.nan):
    lengths = torch.tensor([len(x) for x in sequences])
    states = torch.full((len(sequences), int(lengths.max()) + 3, sequences[0].shape[1]), fill)
    for row, x in zip(states, sequences, strict=True):
        row[: len(x)] = x
    return states, lengths


def close(found, expected, tolerance=1e-5):
    assert found.shape == expected.shape
    assert ((found - expected).abs().max() / expected.abs().max().clamp_min(1)).item() < tolerance


@pytest.mark.parametrize("pooling", POOLS)
def test_a_padded_batch_equals_the_package_on_each_alone(pooling):
    reference = Reference(outputs=3, blocks=3, pooling=pooling)
    head = twin(reference, small(outputs=("a", "b", "c"), blocks=3, pooling=pooling))
    torch.manual_seed(1)
    sequences = [torch.randn(n, 20) for n in (64, 1, 512, 7, 2, 130)]
    with torch.inference_mode():
        found = head(*padded(sequences))
        expected = torch.cat([reference(x[None]) for x in sequences])
        alone = torch.cat([head(x[None], torch.tensor([len(x)])) for x in sequences])
    close(found, expected)
    close(found, alone)


def test_longer_than_the_context_that_the_package_was_built_for():
    torch.manual_seed(1)
    x = torch.randn(2, 1024, 20)
    # Built for 512, the package itself cannot take 1,024; the mask is no weight, so a larger one is the same.
    longer = Reference(context=1024)
    head = twin(Reference(context=512), small())
    with torch.inference_mode():
        close(head(x, torch.tensor([1024, 1024])), longer(x))


def test_the_published_size():
    reference = Reference(inputs=64, width=512, blocks=4, hidden=128)
    head = twin(reference, HeadConfig(input_width=64))
    assert sum(p.numel() for p in head.stack.parameters()) == 6_464_536
    assert list(head.stack.state_dict()) == list(reference.xlstm_pooler.xlstm_stack.state_dict())
    torch.manual_seed(1)
    sequences = [torch.randn(n, 64) for n in (150, 37)]
    with torch.inference_mode():
        close(head(*padded(sequences)), torch.cat([reference(x[None]) for x in sequences]))
        x = torch.randn(1, 90, 512)
        close(head.stack(x), reference.xlstm_pooler.xlstm_stack(x))


@pytest.mark.parametrize("length", [1, 2, 7, 140])
def test_gradients_equal_the_package(length):
    reference = Reference(blocks=3)
    head = twin(reference, small(blocks=3))
    torch.manual_seed(1)
    a = torch.randn(2, length, 20, requires_grad=True)
    b = torch.cat((a.detach(), torch.full((2, 5, 20), math.nan)), 1).requires_grad_()
    reference(a).square().sum().backward()
    head(b, torch.tensor([length, length])).square().sum().backward()
    close(b.grad[:, :length], a.grad)
    assert not b.grad[:, length:].any()
    expected = {n: p.grad for n, p in reference.named_parameters()}
    for name, parameter in head.named_parameters():
        name = name.replace("stack.", "xlstm_pooler.xlstm_stack.", 1).replace("input.", "W.")
        # Relative to each gradient's own size, which may be small.
        scale = expected[name].abs().max().clamp_min(1e-3)
        assert ((parameter.grad - expected[name]).abs().max() / scale).item() < 1e-4, name


def test_gradients_equal_finite_differences():
    torch.manual_seed(0)
    config = small(input_width=3, width=8, hidden=4, heads=2)
    head = twin_random(config).double()
    states = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    names = ("stack.blocks.1.xlstm.slstm_cell._recurrent_kernel_", "stack.blocks.0.xlstm.mlstm_cell.fgate.weight")
    weights = [head.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def run(states, *weights):
        inputs = (states, torch.tensor([6, 4]))
        return torch.func.functional_call(head, dict(zip(names, weights, strict=True)), inputs)

    assert torch.autograd.gradcheck(run, (states, *weights))


def twin_random(config: HeadConfig) -> Head:
    head = Head(config).eval()
    for parameter in head.stack.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return head


def test_extreme_gates_stay_finite():
    head = Head(small())
    with torch.no_grad():
        for name, parameter in head.stack.named_parameters():
            if "bias" in name:
                parameter.mul_(40)
            if "igate.weight" in name:
                parameter.normal_(std=20)
    states = (50 * torch.randn(1, 600, 20)).requires_grad_()
    out = head(states, torch.tensor([600]))
    out.sum().backward()
    assert out.isfinite().all()
    assert states.grad.isfinite().all()


def test_bfloat16_states_are_computed_in_float32():
    head = Head(small()).eval()
    states, lengths = torch.randn(2, 9, 20).bfloat16(), torch.tensor([9, 5])
    out = head(states, lengths)
    assert out.dtype == torch.float32
    assert torch.equal(out, head(states.float(), lengths))


def test_what_does_not_fit_is_named():
    head, ok = Head(small()), torch.zeros(2, 5, 20)
    for lengths, said in (([0, 5], "length 0"), ([5, 6], "length 6"), ([5], r"lengths are \[1\]")):
        with pytest.raises(ValueError, match=said):
            head(ok, torch.tensor(lengths))
    with pytest.raises(ValueError, match=r"\[2, 5, 21\].*20\]"):
        head(torch.zeros(2, 5, 21), torch.tensor([5, 5]))
    with pytest.raises(ValueError, match="whole numbers"):
        head(ok, torch.tensor([5.0, 5.0]))


@pytest.mark.parametrize(
    "changes", [{"width": 30}, {"slstm_at": (2,)}, {"outputs": ("a", "a")}, {"pooling": "sum"}, {"qkv_block": 7}]
)
def test_impossible_shapes_are_refused(changes):
    with pytest.raises(ValueError):
        small(**changes)


def test_a_config_comes_back_from_json():
    config = small(slstm_at=(), outputs=("a", "b"))
    assert HeadConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_on_states_it_equals_itself_on_logits(soft_cap):
    torch.manual_seed(0)
    wide = Head(small(input_width=300, takes="logits")).eval()
    lm_head = LMHead(torch.randn(300, 24), torch.randn(300), 0.5, soft_cap)
    folded = wide.fold_onto(lm_head)
    assert isinstance(folded.input, LongWay) == (soft_cap is not None)
    states, lengths = torch.randn(3, 11, 24), torch.tensor([11, 1, 5])
    with torch.inference_mode():
        close(folded(states, lengths), wide(lm_head.logits(states), lengths))
    with pytest.raises(ValueError, match=r"300 logits.*299"):
        wide.fold_onto(LMHead(lm_head.weight[1:]))
    with pytest.raises(ValueError, match="takes logits"):
        folded.fold_onto(lm_head)


def test_the_package_loads_where_there_is_a_gpu_but_no_cuda_toolkit():
    code = (
        "import torch; torch.cuda.is_available = lambda: True\n"
        "from torch.utils import cpp_extension; cpp_extension.CUDA_HOME = None\n"
        "from m3agiqa.predictor.head import Head, HeadConfig; Head(HeadConfig(input_width=4, width=32, blocks=2))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
