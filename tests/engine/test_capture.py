"""What is kept of states, by the kind that is asked for."""

import pytest
import torch

from m3agiqa.config import CaptureConfig
from m3agiqa.engine.capture import Keeper
from m3agiqa.predictor.lm_head import LMHead
from m3agiqa.tiny.architecture import write_random_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("top_k", [7, 100_000])
def test_the_largest_logits_are_found_without_all_of_them_at_once(model, monkeypatch, top_k):
    head = LMHead.load(model)
    vocabulary, width = head.weight.shape
    states = torch.randn(1000, width, generator=torch.Generator().manual_seed(0))
    expected = head.logits(states).topk(min(top_k, vocabulary))
    keeper, of, tokens = Keeper(CaptureConfig(kind="top_k", top_k=top_k), model), LMHead.logits, []

    def counted(self, some):
        tokens.append(len(some))
        return of(self, some)

    monkeypatch.setattr(LMHead, "logits", counted)
    kept = keeper.keep(states)
    assert sum(tokens) == 1000
    assert max(tokens) <= 100
    assert kept.ids.shape == (1000, min(top_k, vocabulary))
    torch.testing.assert_close(kept.values, expected.values)
    torch.testing.assert_close(head.logits(states).gather(1, kept.ids), expected.values)


def test_states_are_kept_as_they_are(model):
    states = torch.randn(3, 192)
    assert Keeper(CaptureConfig(kind="states"), model).keep(states).values is states
    assert not Keeper(CaptureConfig(kind="none"), model).wanted
