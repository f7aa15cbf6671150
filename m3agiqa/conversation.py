"""Every question that is put to the MLLM, by version, and the reading of its answers.

A conversation is [image, question 1, description, question 2, rating word] for one aspect
(M3-AGIQA, arXiv 2502.15167, section 3.2). A version is part of a run's fingerprint: change a word
of a question and it is another version.
"""

import re
from dataclasses import dataclass

from m3agiqa.aspects import RATING_WORDS, Aspect


@dataclass(frozen=True)
class Wording:
    """The texts of one version.

    `opening` stands right after the image and is the same for all aspects, so that an engine with a
    prefix cache computes image and prompt once; it is left out for an image without a prompt.
    """

    opening: str
    describe: dict[Aspect, str]
    rate: dict[Aspect, str]


@dataclass(frozen=True)
class Questions:
    """The two questions of one image and aspect; the image itself stands before `first`."""

    first: str
    second: str


_WORDS = ", ".join(RATING_WORDS)

WORDINGS: dict[str, Wording] = {
    # The tiny model is trained on this one.
    "v1": Wording(
        opening="The prompt of this AI-generated image is: '{prompt}'. ",
        describe={
            Aspect.QUALITY: "Describe the technical quality of the image.",
            Aspect.CORRESPONDENCE: "Describe how well the image shows what the prompt asks for.",
            Aspect.AUTHENTICITY: "Describe how real the image looks.",
        },
        rate={
            Aspect.QUALITY: f"Rate its quality with one word of: {_WORDS}.",
            Aspect.CORRESPONDENCE: f"Rate its correspondence with one word of: {_WORDS}.",
            Aspect.AUTHENTICITY: f"Rate its authenticity with one word of: {_WORDS}.",
        },
    ),
    # The wording of the released training conversations. They were released for quality; the two
    # other aspects follow its pattern.
    "published": Wording(
        opening=(
            "Take a close look at this AI-generated image and tell me everything you can about what you see. "
            "It's original prompt is: '{prompt}'. "
        ),
        describe={
            Aspect.QUALITY: "Could you please help to analyze the image's quality?",
            Aspect.CORRESPONDENCE: "Could you please help to analyze the image's correspondence with its prompt?",
            Aspect.AUTHENTICITY: "Could you please help to analyze the image's authenticity?",
        },
        rate={
            aspect: (
                f"Now based on your analysis, could you please help to rate the image based on it's {noun}? "
                f"Please give me one word from the list [{_WORDS}]. "
                "Notice that quality word in the list means from low to high."
            )
            for aspect, noun in (
                (Aspect.QUALITY, "overall quality"),
                (Aspect.CORRESPONDENCE, "correspondence with its prompt"),
                (Aspect.AUTHENTICITY, "authenticity"),
            )
        },
    ),
}


def questions(aspect: Aspect, prompt: str | None, version: str = "v1") -> Questions:
    """The two questions of `aspect` for an image that was made from `prompt` (None: not known).

    Raises:
        ValueError: for a version that does not exist, or no prompt where the aspect needs one.
    """
    if version not in WORDINGS:
        raise ValueError(f"conversation version {version!r} is none of {sorted(WORDINGS)}")
    if prompt is None and aspect.needs_prompt:
        raise ValueError(f"{aspect} cannot be asked about an image without a prompt")
    wording = WORDINGS[version]
    # str.replace, not str.format: a prompt may hold braces.
    opening = "" if prompt is None else wording.opening.replace("{prompt}", prompt)
    return Questions(first=opening + wording.describe[aspect], second=wording.rate[aspect])


_RATING = re.compile(r"\b(" + "|".join(RATING_WORDS) + r")\b", re.IGNORECASE)


def parse_rating(answer: str) -> str | None:
    """The rating word in an answer of round 2, or None where there is none or more than one.

    "Good." and "The quality is good" are *good*; "good to excellent" and "bad? no, fair" are not
    guessed at.
    """
    found = {match.lower() for match in _RATING.findall(answer)}
    return found.pop() if len(found) == 1 else None
