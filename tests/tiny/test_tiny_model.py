"""The shipped model and its training: loads as it is, is small, and trains on what an engine asks."""

import itertools
import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from m3agiqa.aspects import RATING_WORDS, Aspect, word_of_score
from m3agiqa.conversation import parse_rating, questions
from m3agiqa.engine.prompting import PromptBuilder
from m3agiqa.tiny.architecture import Size, write_random_model
from m3agiqa.tiny.asking import ask
from m3agiqa.tiny.degrade import Damage
from m3agiqa.tiny.examples import (
    Conversation,
    Encoder,
    altered,
    conversations,
    correspondence_score,
    describe_authenticity,
    describe_correspondence,
    describe_quality,
)
from m3agiqa.tiny.figures import first_fault
from m3agiqa.tiny.opinions import held_out_pictures
from m3agiqa.tiny.pictures import Scene
from m3agiqa.tiny.talks import choose, collate, states_of
from m3agiqa.tiny.vision import look, pixel_values

MODEL = Path(str(files("m3agiqa.tiny"))) / "model"
SCENE = Scene(2, "red", "sphere", "on a sandy plain")


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def encoder(processor):
    return Encoder(processor)


@pytest.fixture(scope="module")
def labelled():
    return list(itertools.islice(held_out_pictures(1000, seed=8_000_000), 120))


@pytest.fixture(scope="module")
def samples(labelled):
    return [known.sample for known in labelled[:12]]


def test_the_model_is_small_and_has_its_card(model):
    card = json.loads((MODEL / "card.json").read_text())
    assert card["parameters"] == sum(p.numel() for p in model.parameters()) < 4_500_000
    assert set(card["results"]["scenes"]) == {str(aspect) for aspect in Aspect}
    assert "toy" in (MODEL / "README.md").read_text()


def test_rating_words_are_single_tokens(encoder):
    ids = encoder.builder.rating_ids
    assert [len(i) for i in ids] == [1] * len(RATING_WORDS)
    assert len(set(ids)) == len(RATING_WORDS)


@pytest.mark.parametrize("text", ["", "naïve café – 中文 🙂", "<image>\n{prompt} 'quoted'", "a\tb\x00"])
def test_any_text_can_be_encoded(processor, text):
    ids = processor.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert processor.tokenizer.decode(ids) == text


def test_training_ids_are_the_ids_of_inference(processor, encoder, samples):
    builder = PromptBuilder(processor.tokenizer, image_token="<image>")
    rng = np.random.default_rng(1)
    for conversation in [c for s in samples for c in conversations(s.facts, rng)]:
        asked = questions(conversation.aspect, conversation.prompt, "v1")
        encoded = encoder.encode(conversation)
        first = encoder.expand(builder.first_round(asked))
        assert encoded.ids[: len(first)] == first
        described = builder.answer(conversation.description)
        round_two = first + described + builder.second_round(asked)
        assert encoded.ids[: len(round_two)] == round_two
        assert encoded.rating_at == len(round_two)
        assert (encoded.ids[encoded.rating_at],) in builder.rating_ids
        learnt = [i for i, target in zip(encoded.ids, encoded.targets, strict=True) if target]
        end = builder.end_of_answer[0]
        assert learnt == [*described, end, encoded.ids[encoded.rating_at], end]


def test_the_image_placeholder_expands_as_the_processor_does_it(processor, encoder):
    asked = questions(Aspect.QUALITY, "a red cube", "v1")
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked.first}]}]
    text = processor.apply_chat_template(message, add_generation_prompt=True)
    own = processor(text=[text], images=[[Image.new("RGB", (50, 90))]], return_tensors="pt", add_special_tokens=False)
    assert own["input_ids"][0].tolist() == encoder.expand(encoder.builder.first_round(asked))


def test_pixel_values_are_those_of_the_processor(processor, samples):
    images = [[Image.fromarray(np.ascontiguousarray(s.pixels))] for s in samples[:2]]
    own = processor.image_processor(images, return_tensors="pt")["pixel_values"][:, 0]
    assert torch.allclose(own, pixel_values([s.pixels for s in samples[:2]]), atol=1e-6)


def test_one_look_at_an_image_serves_all_of_its_conversations(model, encoder, samples):
    talks = choose([s.facts for s in samples[:3]], np.random.default_rng(2))
    batch = collate(talks, [encoder.encode(c) for _, c in talks], encoder.pad_id)
    lengths = [len(encoder.encode(c).ids) for _, c in talks]
    row = int(np.argmin(lengths))
    pixels = pixel_values([s.pixels for s in samples[:3]])
    with torch.no_grad():
        _, tokens = look(model, samples[:3])
        shared, another = (states_of(model, batch.ids, tokens[(batch.image_of + n) % 3]) for n in (0, 1))
        ids = batch.ids[row : row + 1, : lengths[row]]
        with torch.autocast("cpu", torch.bfloat16):
            image = pixels[batch.image_of[row]][None, None]
            alone = model.model(input_ids=ids, pixel_values=image).last_hidden_state[0]
    # As far as numbers of eight bits can be alike, which those about another image are not.
    least = 0.05 * alone.abs().max()
    assert (shared[row, : lengths[row]] - alone).abs().max() < least
    assert (another[row, : lengths[row]] - alone).abs().max() > least


def test_answers_are_well_formed_even_for_prompts_it_cannot_know(model, encoder, samples):
    prompts = [None, "two red spheres on a sandy plain", "Ein Bild von {x}? <image> Ein Haus, (masterpiece:1.2) 中"]
    asked = [Conversation(Aspect.QUALITY, p, "", None) for p in prompts]
    asked += [Conversation(Aspect.CORRESPONDENCE, p, "", None) for p in prompts[1:]]
    answers = ask(model, encoder, [s.pixels for s in samples[: len(asked)]], asked)
    for answer in answers:
        assert answer.description.endswith(".")
        assert len(answer.description) > 15
        assert parse_rating(answer.word) == answer.word
        assert 0 <= answer.score <= 5


def test_a_prompt_far_longer_than_any_trained_on_still_gets_a_rating(model, encoder, samples):
    asked = [Conversation(aspect, "a very long prompt " * 150, "", None) for aspect in Aspect]
    for answer in ask(model, encoder, [samples[0].pixels] * len(asked), asked):
        assert answer.word in RATING_WORDS
        assert 0 <= answer.score <= 5


def test_scores_follow_what_is_seen():
    assert correspondence_score(SCENE, SCENE) == pytest.approx(5)
    rng = np.random.default_rng(0)
    words = [{word_of_score(correspondence_score(SCENE, altered(SCENE, n, rng))) for _ in range(30)} for n in range(5)]
    assert words == [{"excellent"}, {"good"}, {"fair"}, {"poor"}, {"bad"}]
    said = describe_correspondence(SCENE, altered(SCENE, 1, rng))
    assert said.count("same") == 3
    assert said.count("different") == 1
    assert describe_correspondence(SCENE, SCENE).startswith("Asked for two, here two: same. Asked for red, here red: ")


def test_one_fault_is_named_as_strongly_as_it_is_rated():
    assert describe_quality(()) == "The image is sharp and clean."
    assert describe_quality((Damage("blur", 0.7), Damage("noise", 0.1))) == (
        "The image is strongly blurred and barely noisy."
    )
    assert first_fault("The image is strongly blurred and barely noisy.") == "blur"
    assert describe_authenticity((Damage("melted", 1.0),)) == "A huge area looks melted."


def test_random_models_come_in_any_size(tmp_path):
    size = Size(
        image_size=64, patch_size=16, scale_factor=1, vision_width=64, vision_layers=1, vision_heads=2, vision_mlp=64,
        text_width=64, text_layers=1, text_mlp=64, text_head_dim=32,
    )  # fmt: skip
    folder = write_random_model(tmp_path / "m", size, vocabulary=800)
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.image_seq_len == size.image_tokens == 16
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    inputs = processor(text="<image>Hi", images=[Image.new("RGB", (30, 20))], return_tensors="pt")
    with torch.no_grad():
        logits = loaded(**inputs).logits
    assert logits.shape[-1] == len(processor.tokenizer) <= 800
    assert torch.isfinite(logits).all()
