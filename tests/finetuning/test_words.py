"""Rating words and human scores in a fine-tuning: words made in stated bins, and words that do not fit the scores."""

import pytest

from m3agiqa import finetune as module
from m3agiqa.aspects import RATING_WORDS, Aspect
from m3agiqa.errors import UserError
from m3agiqa.finetune import finetune
from m3agiqa.finetuning.talks import Columns
from tests.finetuning.helpers import rows, settings, talks_of, write

Q, A, C = Aspect.QUALITY, Aspect.AUTHENTICITY, Aspect.CORRESPONDENCE
LABEL = Columns(labels={Q: "mos_quality"})


def read(tmp_path, made, columns, *more):
    file = write(tmp_path / "c", made, pictures=False)
    return talks_of(file, columns=columns, ratings=settings("tiny", *more).ratings)


def ready(monkeypatch, tmp_path, made, columns, *more):
    """What would be trained on, and what the command says before."""
    found, said = [], []
    monkeypatch.setattr(module, "_train", lambda config, inputs, talks, *rest: found.append(talks))
    file = write(tmp_path / "c", made, pictures=False)
    finetune(settings("tiny", *more), [file], str(tmp_path / "a"), columns, say=said.append)
    return found[0], said


def unrated(count, aspect="quality"):
    return [{k: v for k, v in row.items() if k != f"teacher_{aspect}_rating"} for row in rows(count, (aspect,))]


def test_words_are_made_in_stated_bins(tmp_path):
    """The scores are 0, 1.25, 2.5, 3.75 and 5."""

    def words(*more, columns=LABEL):
        return [talk.word for talk in read(tmp_path, unrated(5), columns, *more).talks]

    assert words() == words("ratings.dataset=agiqa-3k") == list(RATING_WORDS)
    assert words("ratings.edges={quality: [1.25, 3, 3.5, 5]}") == ["bad", "poor", "poor", "good", "excellent"]
    assert words("ratings.edges={authenticity: [1, 2, 3, 4]}") == list(RATING_WORDS)
    # Bins of a data set are on its own scale, whatever --scale is.
    wide = Columns(labels={Q: "mos_quality"}, scale=(0, 10))
    assert words(columns=wide) == ["bad", "bad", "poor", "poor", "fair"]
    assert words("ratings.dataset=agiqa-3k", columns=wide) == list(RATING_WORDS)


def test_the_command_makes_words_as_its_configuration_states(monkeypatch, tmp_path):
    talks, said = ready(monkeypatch, tmp_path, unrated(5), LABEL, "ratings.edges={quality: [1, 1.5, 2, 5]}")
    assert [talk.word for talk in talks.talks] == ["bad", "poor", "good", "good", "excellent"]
    assert said == []


def test_an_aspect_without_bins_is_refused(tmp_path):
    columns = Columns(labels={A: "mos_authenticity"})
    with pytest.raises(UserError, match=r"states no bins for authenticity; give ratings\.edges\.authenticity"):
        read(tmp_path, unrated(3, "authenticity"), columns, "ratings.dataset=agiqa-3k")
    given = ("ratings.dataset=agiqa-3k", "ratings.edges={authenticity: [1, 2, 3, 4]}")
    assert read(tmp_path, unrated(3, "authenticity"), columns, *given).talks[1].word == "poor"
    with pytest.raises(UserError, match="agiqa-3k"):
        settings("tiny", "ratings.dataset=koniq")


BOTH = Columns(labels={Q: "mos_quality", C: "mos_correspondence"})


def test_words_that_fit_their_scores_are_not_spoken_of(monkeypatch, tmp_path):
    made = rows(20, ("quality", "correspondence"))
    made[3] |= {"mos_correspondence": ""}
    assert ready(monkeypatch, tmp_path, made, BOTH)[1] == []


def test_words_made_from_other_scores_are(monkeypatch, tmp_path):
    """As in the published file of AGIQA-3k on correspondence, whose words are those of the quality."""
    made = rows(20, ("quality", "correspondence"))
    for row in made:
        row["teacher_correspondence_rating"] = row["teacher_quality_rating"]
    made[0] |= {"mos_correspondence": 2.5, "teacher_correspondence_rating": "fair"}
    talks, said = ready(monkeypatch, tmp_path, made, BOTH)
    assert len(talks.talks) == 40
    cure = "; `m3agiqa conversations --aspect correspondence --check mos_correspondence --fix-words` makes them anew, "
    assert said == [
        "note: correspondence: teacher_correspondence_rating: the words agree with mos_correspondence in 5% of 20 rows"
        f": they were made in other bins, or not from these scores{cure}ratings.edges.correspondence states bins"
    ]
    made[0] = rows(1, ("quality", "correspondence"))[0] | {"teacher_correspondence_rating": "bad"}
    (line,) = ready(monkeypatch, tmp_path, made, BOTH)[1]
    told = (
        "agree with mos_correspondence in 0% of 20 rows, and with mos_quality in 100%: they were made from mos_quality"
    )
    assert told in line


def test_words_of_stated_bins_fit_in_these_alone(monkeypatch, tmp_path):
    made = rows(20, ("quality",))
    for row in made:
        row["teacher_quality_rating"] = "bad" if row["mos_quality"] < 3 else "good"
    edges = "ratings.edges={quality: [3, 3.01, 3.02, 6]}"
    assert ready(monkeypatch, tmp_path, made, LABEL, edges)[1] == []
    (line,) = ready(monkeypatch, tmp_path, made, LABEL)[1]
    assert "the words agree with mos_quality in 40% of 20 rows: they were made in other bins" in line
    assert ready(monkeypatch, tmp_path, made, Columns())[1] == []
