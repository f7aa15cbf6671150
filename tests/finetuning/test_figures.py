"""The figures that a training is judged by, worked out by hand, and the step that is best by one of them."""

import pytest
from safetensors.torch import load_file

from m3agiqa.aspects import Aspect
from m3agiqa.finetuning.figures import Judged, figures, figures_line, value_of
from m3agiqa.finetuning.trainer import BEST, write_checkpoint
from tests.finetuning.helpers import make, rows, settings, write

Q, C = Aspect.QUALITY, Aspect.CORRESPONDENCE


def judged(aspect, *answers):
    """Answers as (right word, said word, expected rating, score), with a loss of 3 for a weight of 2 each."""
    return [Judged(aspect, 3.0, 2.0, *answer) for answer in answers]


# Ranks of what is expected: 1, 3, 2, 4, 5; of the scores: 1, 2, 3, 4.5, 4.5.
FIVE = judged(Q, (0, 0, 0.5, 0.1), (1, 2, 2.5, 1.2), (2, 0, 2.0, 2.0), (3, 3, 4.0, 4.9), (4, -9, 4.5, 4.9))
TURNED = judged(C, (0, 1, 3.0, 1.0), (1, 1, 2.0, 2.0), (2, 1, 1.0, 3.0))


def test_figures_of_each_aspect():
    found = figures([*TURNED, *FIVE])
    assert list(found) == ["quality", "correspondence"]
    # The products of the ranks' deviations add up to 8.5, their squares to 10 and 9.5.
    assert found["quality"] == {
        "loss": 1.5, "accuracy": 0.4, "within_one": 0.6, "srcc": pytest.approx(8.5 / (10 * 9.5) ** 0.5),
        "conversations": 5,
    }  # fmt: skip
    assert found["correspondence"] == {
        "loss": 1.5, "accuracy": pytest.approx(1 / 3), "within_one": 1.0, "srcc": pytest.approx(-1),
        "conversations": 3,
    }  # fmt: skip
    assert figures_line(found) == (
        "quality loss 1.500 right 0.40 within one 0.60 SRCC 0.872; "
        "correspondence loss 1.500 right 0.33 within one 1.00 SRCC -1.000"
    )


def test_a_loss_is_by_weight_and_none_without_answers():
    loud, quiet = Judged(Q, 8.0, 3.0, 0, 0, 1.0, 1.0), Judged(Q, 1.0, 6.0, 0, 0, 2.0, 2.0)
    assert figures([loud, quiet])["quality"]["loss"] == 1.0
    silent = Judged(Q, 0.0, 0.0, 0, 0, 1.0, 1.0)
    assert figures([silent])["quality"]["loss"] is None
    assert figures_line(figures([silent])) == "quality right 1.00 within one 1.00 SRCC --"


@pytest.mark.parametrize(
    ("best_by", "value"),
    [("loss", -1.5), ("accuracy", (0.4 + 1 / 3) / 2), ("within_one", 0.8), ("srcc", (8.5 / 95**0.5 - 1) / 2)],
)
def test_what_is_best_is_the_mean_of_the_aspects(best_by, value):
    assert value_of(figures([*FIVE, *TURNED]), best_by) == pytest.approx(value)


def test_what_is_undefined_for_an_aspect_is_not_best():
    equal = judged(C, (0, 0, 1.0, 2.0), (1, 1, 3.0, 2.0))
    found = figures([*FIVE, *equal])
    assert found["correspondence"]["srcc"] is None
    assert value_of(found, "srcc") is None
    assert value_of(found, "accuracy") == 0.7
    assert value_of({}, "accuracy") is None


def test_the_step_that_ranks_best_is_kept(plain, tmp_path):
    config = settings(plain, "watch.best_by=srcc", "watch.evaluate_steps=2", "optim.epochs=4")
    trainer, told, weights = make(config, write(tmp_path / "c", rows(16)), judged=6), [], {}

    def take(record):
        told.append(record)
        weights[record["step"]] = {name: one.clone() for name, one in trainer.weights().items()}

    trainer.run(take, lambda: None)
    looks = [record for record in told if "validation" in record]
    assert [record["step"] for record in looks] == [2, 4, 5, 6, 8, 10, 12, 14, 15, 16, 18, 20]
    means = [sum(one["srcc"] for one in look["validation"].values()) / 2 for look in looks]
    assert [look["best"] for look in looks] == [mean > max(means[:i], default=-2) for i, mean in enumerate(means)]
    best = looks[means.index(max(means))]["step"]
    assert trainer.progress.best_step == best
    write_checkpoint(tmp_path, trainer.checkpoint())
    kept = load_file(tmp_path / BEST)
    assert kept.keys() == weights[best].keys()
    assert all((kept[name] == one).all() for name, one in weights[best].items())
