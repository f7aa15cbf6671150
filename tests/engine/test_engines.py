"""The engines agree: vLLM against transformers, on the shipped model and on a random one."""

import asyncio
import csv
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from m3agiqa.aspects import RATING_WORDS, Aspect
from m3agiqa.config import RunConfig, load_config
from m3agiqa.engine.base import Item, ItemFailed, ItemRejected, Outcome, create_engine
from m3agiqa.models import model_folder
from m3agiqa.predictor.fold import fold
from m3agiqa.predictor.lm_head import LMHead
from m3agiqa.tiny.architecture import write_random_model
from tests.engine.capture_helpers import write_random_adapter

pytestmark = pytest.mark.slow

ASPECTS = tuple(Aspect)


def config_for(kind: str, model: str, *more: str) -> RunConfig:
    return load_config(
        None,
        [
            f"engine.kind={kind}",
            f"model.path={model}",
            "model.dtype=float32",
            "scoring.max_description_tokens=48",
            *more,
        ],
    )


def items(demo_corpus) -> list[Item]:
    rows = list(csv.DictReader((demo_corpus / "manifest.csv").open()))
    found = []
    for i, row in enumerate(rows[:10]):
        pixels = np.asarray(Image.open(demo_corpus / row["image_path"]).convert("RGB"))
        prompt = None if i == 3 else row["prompt"]
        found.append(Item(pixels, prompt, ASPECTS if prompt else (Aspect.QUALITY, Aspect.AUTHENTICITY)))
    rng = np.random.default_rng(0)
    for height, width, prompt in [
        (8, 8, "a cat"),
        (8, 300, "x"),
        (700, 40, "<image><end_of_utterance> {x}"),
        (33, 65, "ü" * 300),
    ]:
        found.append(Item(rng.integers(0, 255, (height, width, 3), dtype=np.uint8), prompt, ASPECTS))
    return found


def assess(config: RunConfig, asked: list[Item]) -> tuple[list[Outcome], dict[str, float]]:
    async def run() -> tuple[list[Outcome], dict[str, float]]:
        engine = create_engine(config)
        try:
            return await engine.assess(asked), engine.stats()
        finally:
            engine.close()

    return asyncio.run(run())


def assess_and_abort(config: RunConfig, asked: list[Item]) -> tuple[list[Outcome], dict[str, float], list[Outcome]]:
    """What `assess` gives of a vLLM engine, and its outcomes of the first four items when a request is aborted."""

    async def run() -> tuple[list[Outcome], dict[str, float], list[Outcome]]:
        engine = create_engine(config)
        try:
            found, stats = await engine.assess(asked), engine.stats()
            return found, stats, await _abort_one(engine, asked[:4])
        finally:
            engine.close()

    return asyncio.run(run())


async def _abort_one(engine: Any, asked: list[Item]) -> list[Outcome]:
    """Outcomes of items of which one request is given up half-way."""
    running = asyncio.create_task(engine.assess(asked))
    # One that vLLM is at work on.
    while not engine._engine.output_processor.request_states:
        await asyncio.sleep(0.001)
    await engine._engine.abort(next(iter(engine._engine.output_processor.request_states)), internal=True)
    return await running


def the_one_given_up(outcomes: list[Outcome]) -> ItemFailed:
    (failed,) = [outcome for outcome in outcomes if isinstance(outcome, ItemFailed)]
    assert str(failed) == "the engine gave up on this image's request (abort)"
    return failed


@pytest.fixture(scope="module", params=["tiny", "random"])
def runs(request, demo_corpus, tmp_path_factory):
    """What `both` gives, and the outcomes in the same vLLM engine when a request is aborted."""
    model = "tiny" if request.param == "tiny" else str(write_random_model(tmp_path_factory.mktemp("random")))
    asked = items(demo_corpus)
    asked.append(Item(asked[0].pixels, "word " * 9000, ASPECTS))
    expected, _ = assess(config_for("transformers", model, "engine.batch_size=7", "capture.kind=states"), asked)
    found, stats, aborted = assess_and_abort(config_for("vllm", model, "capture.kind=states"), asked)
    return (request.param, asked, expected, found, stats), aborted


@pytest.fixture(scope="module")
def both(runs):
    """Outcomes of the transformers and the vLLM engine for the same items, and vLLM's counters."""
    return runs[0]


def test_vllm_and_transformers_give_the_same_greedy_text(both):
    _, asked, expected, found, _ = both
    for item, theirs, ours in zip(asked[:-1], expected[:-1], found[:-1], strict=True):
        assert tuple(ours) == tuple(theirs) == item.aspects
        for aspect in item.aspects:
            a, b = theirs[aspect], ours[aspect]
            assert (a.description, a.rating_answer, a.rating, a.finish_reason, a.rating_cut) == (
                b.description,
                b.rating_answer,
                b.rating,
                b.finish_reason,
                b.rating_cut,
            )
            assert (a.prompt_tokens, a.generated_tokens) == (b.prompt_tokens, b.generated_tokens)


def test_vllm_and_transformers_give_the_same_rating_probabilities(both):
    _, asked, expected, found, _ = both
    for item, theirs, ours in zip(asked[:-1], expected[:-1], found[:-1], strict=True):
        for aspect in item.aspects:
            assert ours[aspect].rating_probs == pytest.approx(theirs[aspect].rating_probs, abs=1e-4)
            assert sum(ours[aspect].rating_probs) == pytest.approx(1.0)


def test_a_conversation_longer_than_the_context_is_rejected_with_its_counts(both):
    _, _, expected, found, _ = both
    for outcome in (expected[-1], found[-1]):
        assert isinstance(outcome, ItemRejected)
        assert "4096" in str(outcome)


def test_vllm_and_transformers_capture_the_same_states(both):
    _, asked, expected, found, _ = both
    for item, theirs, ours in zip(asked[:-1], expected[:-1], found[:-1], strict=True):
        for aspect in item.aspects:
            a, b = theirs[aspect].captured.values, ours[aspect].captured.values
            assert a.shape == b.shape == (ours[aspect].prompt_tokens, a.shape[1])
            assert (a - b).abs().max() <= 1e-4 * a.abs().max()


def test_folded_projections_of_captured_states_equal_the_logits_way(both, tmp_path):
    """vLLM's states through the folded matrix, against transformers' through the logits of the whole vocabulary."""
    name, asked, expected, found, _ = both
    if name == "tiny":
        folder = model_folder(config_for("vllm", "tiny").model)
    else:
        folder = write_random_model(tmp_path / "same")
    head = LMHead.load(folder)
    head = LMHead(head.weight.float(), None if head.bias is None else head.bias.float(), head.scale, head.soft_cap)
    torch.manual_seed(0)
    weight = torch.randn(512, head.weight.shape[0]) / head.weight.shape[0] ** 0.5
    bias = torch.randn(512)
    folded = fold(weight, bias, head)
    for item, theirs, ours in zip(asked[:-1], expected[:-1], found[:-1], strict=True):
        for aspect in item.aspects:
            long = torch.nn.functional.linear(head.logits(theirs[aspect].captured.values), weight, bias)
            short = folded(ours[aspect].captured.values)
            assert (short - long).abs().max() <= 1e-5 * long.abs().max()


def test_the_shipped_model_answers_both_rounds_sensibly(both):
    name, asked, _, found, _ = both
    if name == "random":
        pytest.skip("a random model answers at random")
    for item, outcome in zip(asked[:10], found[:10], strict=True):
        for aspect in item.aspects:
            assert outcome[aspect].rating in RATING_WORDS
            assert outcome[aspect].finish_reason == "stop"
            assert not outcome[aspect].rating_cut
            assert len(outcome[aspect].description.split()) >= 3


def test_vllm_computes_an_image_once(both):
    *_, stats = both
    # Every conversation asks for its image twice; what the processor makes of it is looked up, not made again.
    assert stats["processor_cache_hits"] / stats["processor_cache_queries"] > 0.6
    assert stats["encoded_images"] == stats["images"]
    assert stats["prefix_cache_hits"] > 0


def test_words_of_several_tokens_agree_too(demo_corpus, tmp_path):
    """Without merges every word is spelt in bytes: the tree of the words is walked by both engines alike."""
    folder = write_random_model(tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    asked = items(demo_corpus)[:3]
    more = ("scoring.aspects=quality",)
    expected, _ = assess(config_for("transformers", str(folder), *more), asked)
    found, _ = assess(config_for("vllm", str(folder), *more), asked)
    for theirs, ours in zip(expected, found, strict=True):
        assert ours[Aspect.QUALITY].rating_probs == pytest.approx(theirs[Aspect.QUALITY].rating_probs, abs=1e-4)


@pytest.mark.parametrize("kind", ["transformers", "vllm"])
def test_answers_that_are_cut_say_so(kind, demo_corpus):
    """By the shipped model, which ends its answers where it may: after more than 4 tokens, and after one word."""
    asked = items(demo_corpus)[:3]
    more = ("scoring.max_description_tokens=4", "scoring.max_rating_tokens=1")
    cut, _ = assess(config_for(kind, "tiny", *more), asked)
    for item, outcome in zip(asked, cut, strict=True):
        for aspect in item.aspects:
            assert (outcome[aspect].finish_reason, outcome[aspect].rating_cut) == ("length", True)
            assert outcome[aspect].rating in RATING_WORDS
            assert outcome[aspect].generated_tokens == 5


def test_adapters_by_aspect_and_none_beside_them_agree(demo_corpus, tmp_path):
    """One engine, two adapters, and an aspect on the base model, all in the same batches; then one is given up."""
    model = write_random_model(tmp_path / "model")
    folders = {a: write_random_adapter(model, tmp_path / a, i) for i, a in enumerate(("quality", "correspondence"))}
    adapters = "model.adapters={" + ", ".join(f"{aspect}: {folder}" for aspect, folder in folders.items()) + "}"
    asked = items(demo_corpus)
    expected, _ = assess(config_for("transformers", str(model), adapters, "capture.kind=states"), asked)
    plain, _ = assess(config_for("transformers", str(model), "capture.kind=states"), asked)
    found, _, aborted = assess_and_abort(config_for("vllm", str(model), adapters, "capture.kind=states"), asked)
    failed = the_one_given_up(aborted)
    again = [(i, ours) for i, ours in enumerate(aborted) if ours is not failed]
    for i, ours in [*enumerate(found), *again]:
        theirs, base = expected[i], plain[i]
        assert set(ours) == set(theirs)
        for aspect in theirs:
            a, b, c = (outcome[aspect].captured.values for outcome in (theirs, ours, base))
            assert ours[aspect].description == theirs[aspect].description
            assert (a - b).abs().max() <= 1e-4 * a.abs().max()
            if aspect in folders:
                assert ours[aspect].description != base[aspect].description, "the adapter does nothing"
            else:
                assert (b - c).abs().max() <= 1e-4 * c.abs().max()


@pytest.mark.parametrize(
    ("engine", "kind"), [("transformers", "top_k"), ("transformers", "logits"), ("vllm", "top_k"), ("vllm", "logits")]
)
def test_logits_are_captured_by_position(demo_corpus, tmp_path, engine, kind):
    folder = write_random_model(tmp_path / "model")
    asked = items(demo_corpus)[:2]
    more = ("scoring.aspects=quality", f"capture.kind={kind}", "capture.top_k=5")
    found, _ = assess(config_for(engine, str(folder), *more), asked)
    states, _ = assess(config_for("transformers", str(folder), "scoring.aspects=quality", "capture.kind=states"), asked)
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    for one, full in zip(found, states, strict=True):
        captured, logits = one[Aspect.QUALITY].captured, full[Aspect.QUALITY].captured.values @ head.T
        if kind == "logits":
            assert torch.allclose(captured.values, logits, atol=1e-5)
        else:
            assert captured.values.shape == captured.ids.shape == (logits.shape[0], 5)
            assert torch.allclose(captured.values, logits.gather(1, captured.ids), atol=1e-5)
            assert torch.equal(captured.ids[:, 0], logits.argmax(-1))


def test_a_request_aborted_half_way_fails_its_row_only(runs):
    """What vLLM gives up on says so in its row; the images beside it are judged."""
    (name, *_, expected, _), found = runs
    if name == "random":
        pytest.skip("of a random model, other batches may change a word")
    failed = the_one_given_up(found)
    for theirs, ours in zip(expected[:4], found, strict=True):
        if ours is not failed:
            assert {a: o.description for a, o in ours.items()} == {a: o.description for a, o in theirs.items()}


def test_the_simulated_engine_is_deterministic(demo_corpus):
    config = config_for("simulated", "tiny")
    asked = items(demo_corpus)
    assert assess(config, asked)[0] == assess(config, asked)[0]
    one = assess(config, asked[:1])[0]
    assert one[0] == assess(config, asked)[0][0]
