"""What is learnt from a conversation: token ids, loss mask, batches, steps. Held against transformers itself."""

import asyncio

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from m3agiqa.aspects import RATING_WORDS, Aspect
from m3agiqa.config import RunConfig
from m3agiqa.conversation import questions
from m3agiqa.engine.base import Item
from m3agiqa.engine.transformers import TransformersEngine
from m3agiqa.errors import UserError
from m3agiqa.finetuning.encoding import collate
from m3agiqa.finetuning.trainer import LAST, write_checkpoint
from m3agiqa.models import model_folder
from tests.finetuning.helpers import make, rows, settings, write


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write(tmp_path_factory.mktemp("corpus"), rows(8))


@pytest.fixture(params=["plain", "tiled"])
def model(request):
    return request.getfixturevalue(request.param)


def pixels_of(corpus, number):
    return np.asarray(Image.open(corpus.replace("corpus.csv", f"{number}.png")).convert("RGB"))


def whole_conversation(trainer, corpus, place):
    """The same conversation by the processor's own template, in one piece."""
    talk = trainer._train.talks[place]
    asked = questions(talk.aspect, talk.prompt, "v1")
    processor = trainer._pictures.__self__._processor
    said = [asked.first, talk.description, asked.second, talk.word]
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": [{"type": "text", "text": text}]}
        for i, text in enumerate(said)
    ]
    messages[0]["content"].insert(0, {"type": "image"})
    text = processor.apply_chat_template(messages)
    image = Image.fromarray(pixels_of(corpus, talk.picture))
    return processor(text=[text], images=[[image]], add_special_tokens=False, return_tensors="pt")


def test_token_ids_are_those_of_the_template_and_only_answers_are_learnt(model, corpus):
    trainer = make(settings(model), corpus)
    lengths = set()
    for place, (talk, one) in enumerate(zip(trainer._train.talks, trainer._train.encoded, strict=True)):
        assert one.ids.tolist() == whole_conversation(trainer, corpus, place)["input_ids"][0].tolist()
        tokenizer = trainer._pictures.__self__._processor.tokenizer
        learnt = tokenizer.decode(one.ids[one.weights > 0])
        assert learnt == f" {talk.description}<end_of_utterance> {talk.word}<end_of_utterance>"
        assert tokenizer.decode(one.ids[one.rating_at :]).startswith(f" {talk.word}<end_of_utterance>")
        lengths.add(len(one.ids))
    assert len(lengths) > 1


def test_the_rating_counts_as_much_as_it_is_told_to(plain, corpus):
    once, thrice = (make(settings(plain, f"loss.rating={n}"), corpus)._train.encoded[0] for n in (1, 3))
    assert (thrice.weights - once.weights).tolist() == [2.0 * (i == once.rating_at) for i in range(len(once.ids))]
    with torch.no_grad():
        losses = [
            float(lot.loss[0] / lot.weight[0])
            for lot in (outcome(make(settings(plain, f"loss.rating={n}"), corpus), [0]) for n in (1, 3))
        ]
    assert losses[0] != losses[1]


def outcome(trainer, places):
    trainer._learner.eval()
    with torch.no_grad():
        return trainer.model(trainer._collate(trainer._train, places))


def test_the_loss_is_that_of_transformers(model, corpus):
    trainer = make(settings(model), corpus)
    for place in range(4):
        inputs = whole_conversation(trainer, corpus, place)
        labels = torch.where(torch.tensor(trainer._train.encoded[place].weights) > 0, inputs["input_ids"], -100)
        with torch.no_grad():
            theirs = trainer._learner.model(**inputs, labels=labels).loss
        ours = outcome(trainer, [place])
        assert float(ours.loss / ours.weight) == pytest.approx(float(theirs), rel=1e-5)


def test_a_padded_batch_is_its_rows(model, corpus):
    trainer = make(settings(model), corpus)
    places = list(range(len(trainer._train.talks)))
    together, alone = outcome(trainer, places), [outcome(trainer, [place]) for place in places]
    for name in ("loss", "weight", "ratings"):
        singly = torch.cat([getattr(one, name) for one in alone])
        torch.testing.assert_close(getattr(together, name), singly, rtol=2e-5, atol=2e-5)


def test_what_the_vision_side_made_is_kept_or_made_anew_alike(model, corpus):
    kept, anew = (make(settings(model, f"data.cache_mib={mib}"), corpus) for mib in (100, 0))
    assert kept._pictures.__self__.kept == 8
    assert anew._pictures.__self__.kept == 0
    assert all(one.seen is not None for one in kept._pictures(range(8)).values())
    assert all(one.seen is None for one in anew._pictures(range(8)).values())
    places = list(range(8))
    torch.testing.assert_close(outcome(kept, places).loss, outcome(anew, places).loss, rtol=1e-5, atol=1e-5)


def test_ratings_are_those_of_the_engine(model, corpus):
    config = RunConfig().model_copy(update={"model": settings(model, "model.dtype=float32").model})
    engine = TransformersEngine(config)
    trainer = make(settings(model), corpus)
    for place in (0, 5):
        talk = trainer._train.talks[place]
        item = Item(pixels_of(corpus, talk.picture), talk.prompt, (talk.aspect,), {talk.aspect: talk.description})
        (found,) = asyncio.run(engine.assess([item]))
        ours = outcome(trainer, [place]).ratings.softmax(-1)[0]
        assert ours.tolist() == pytest.approx(list(found[talk.aspect].rating_probs), abs=1e-6)
        assert found[talk.aspect].prompt_tokens == trainer._train.encoded[place].rating_at


def test_parts_of_the_model_are_trained_as_asked(plain, corpus):
    def parts(*more):
        trainer = make(settings(plain, *more), corpus)
        trainer._step([trainer._collate(trainer._train, [0, 1])])
        moved = {name for name, one in trainer._learner.learnt().items() if one.grad is not None}
        assert moved == set(trainer._learner.learnt())
        return {name.split(".")[1] for name in moved}, {name.split(".lora")[0].split(".")[-1] for name in moved}

    language = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert parts() == ({"text_model"}, language)
    assert parts("lora.targets=q_proj,v_proj") == ({"text_model"}, {"q_proj", "v_proj"})
    found = parts("lora.vision=true", "lora.connector=true")
    assert found[0] == {"text_model", "vision_model", "connector"}
    with pytest.raises(UserError, match="it has down_proj, gate_proj"):
        parts("lora.targets=query")


def steps(trainer, count):
    for step in range(count):
        loss = trainer._step(trainer._batches(step))
        trainer.progress.step += 1
    return loss


def test_accumulation_is_the_larger_batch(tiled, corpus):
    whole, pieces = (
        make(settings(tiled, "optim.batch_size=6", f"optim.micro_batch={n}", "loss.score=0.5"), corpus) for n in (6, 2)
    )
    assert steps(whole, 3) == pytest.approx(steps(pieces, 3), rel=1e-4)
    for name, one in whole.weights().items():
        torch.testing.assert_close(one, pieces.weights()[name], rtol=1e-3, atol=1e-4)


def test_checkpointed_layers_learn_the_same(plain, corpus):
    usual, twice = (make(settings(plain, f"compute.gradient_checkpointing={on}"), corpus) for on in (False, True))
    assert steps(usual, 2) == pytest.approx(steps(twice, 2), rel=1e-5)


def test_it_goes_on_to_the_same_bits(plain, corpus, tmp_path):
    config = settings(plain, "lora.dropout=0.3", "compute.precision=bf16", "watch.checkpoint_steps=2", "optim.epochs=3")
    told, saved = [], []

    def save(trainer):
        folder = tmp_path / str(trainer.progress.step)
        folder.mkdir(exist_ok=True)
        write_checkpoint(folder, trainer.checkpoint())
        saved.append(folder)

    whole = make(config, corpus)
    whole.run(told.append, lambda: save(whole))
    assert whole.progress.step == 9
    assert [folder.name for folder in saved] == ["2", "3", "4", "6", "8", "9"]
    for at in ("4", "6"):
        again = make(config, corpus)
        again.load(tmp_path / at)
        new = []
        again.run(new.append, lambda: None)
        assert {record["step"] for record in new} <= {5, 6, 7, 8, 9}
        for name, one in whole.weights().items():
            assert torch.equal(one, again.weights()[name])
        assert untimed(again.progress.history) == untimed(told)
    assert set(load_file(tmp_path / "9" / LAST)) == set(whole.weights())


def untimed(records):
    return [{key: value for key, value in record.items() if key != "conversations_per_second"} for record in records]


def test_a_handful_is_learnt_by_heart(plain, corpus):
    trainer = make(
        settings(plain, "optim.epochs=60", "optim.batch_size=12", "optim.micro_batch=12", "optim.learning_rate=0.01"),
        corpus,
    )
    told = []
    trainer.run(told.append, lambda: None)
    evaluated = [record["validation"] for record in told if "validation" in record]
    assert set(evaluated[-1]) == {Aspect.QUALITY, Aspect.AUTHENTICITY}
    assert told[-2]["loss"] < 0.1
    right = outcome(trainer, list(range(12)))
    assert [RATING_WORDS[i] for i in right.ratings.argmax(-1)] == [talk.word for talk in trainer._train.talks]


def test_an_empty_piece_changes_nothing(plain, corpus):
    trainer, other = (make(settings(plain), corpus) for _ in range(2))
    batches = [trainer._collate(trainer._train, [0, 1, 2])]
    assert trainer._step(batches) == pytest.approx(other._step([*batches, other._collate(other._train, [])]), rel=1e-6)
    for name, one in trainer.weights().items():
        torch.testing.assert_close(one, other.weights()[name], rtol=1e-5, atol=1e-6)


def test_the_score_term_pulls_the_expected_rating(plain, corpus):
    how = ("optim.learning_rate=0.005", "optim.batch_size=12", "optim.micro_batch=12", "optim.epochs=10")
    without, with_it = (make(settings(plain, f"loss.score={n}", *how), corpus) for n in (0, 5))
    errors = []
    for trainer in (without, with_it):
        steps(trainer, 8)
        batch = trainer._collate(trainer._train, list(range(12)))
        errors.append(float((outcome(trainer, list(range(12))).expected() - batch.scores).square().mean()))
    assert errors[1] < errors[0]


def test_collating_shows_each_image_once(plain, corpus):
    trainer = make(settings(plain), corpus)
    talks = trainer._train.talks[:4]
    pictures = trainer._pictures(talk.picture for talk in talks)
    batch = collate(talks, trainer._train.encoded[:4], pictures, 0)
    assert batch.image_of == [0, 0, 1, 1]
    assert len(batch.images) == 2
    assert model_folder(settings(plain).model) == plain
