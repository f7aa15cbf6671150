import pytest

from m3agiqa.aspects import Aspect
from m3agiqa.export.rows import Captions

ROW = {
    "prompt": "A red fox.\n in the snow ",
    "quality_description": "The image is sharp.",
    "quality_mos": 4.5,
    "quality_rating": "fair",
    "authenticity_description": None,
    "authenticity_mos": None,
    "authenticity_rating": "poor",
    "correspondence_mos": None,
    "correspondence_rating": None,
}


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        (Captions(), "A red fox. in the snow"),
        (Captions("description"), "The image is sharp"),
        (Captions("both"), "A red fox. in the snow. The image is sharp"),
        (Captions("both", Aspect.AUTHENTICITY), "A red fox. in the snow"),
        (Captions("description", Aspect.AUTHENTICITY), ""),
        (Captions("prompt", tags=True), "A red fox. in the snow, excellent quality, poor authenticity"),
        (Captions("description", Aspect.AUTHENTICITY, tags=True), "excellent quality, poor authenticity"),
    ],
)
def test_captions(captions, expected):
    assert captions.of(ROW) == expected
    assert set(captions.columns()) <= set(ROW)


def test_a_row_without_a_prompt_has_an_empty_caption():
    assert Captions().of({"prompt": None}) == ""
