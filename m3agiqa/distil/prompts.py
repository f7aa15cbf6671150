"""What the teacher is asked, by version, and the reading of its answers."""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from m3agiqa.aspects import RATING_WORDS, Aspect
from m3agiqa.distil.tasks import Task


@dataclass(frozen=True)
class TeacherWording:
    """The texts of one version. `told` is left out of a blind request, `origin` for an image without a prompt."""

    system: str
    origin: str
    told: str
    describe: str
    look_at: dict[Aspect, str]
    silence: str
    answer: str
    again: str


_WORDS = ", ".join(RATING_WORDS)

TEACHER_WORDINGS: dict[str, TeacherWording] = {
    "d1": TeacherWording(
        system="You look closely at AI-generated images and explain, in plain words, why people judge them as they do.",
        origin="The prompt of this AI-generated image is: '{prompt}'. ",
        told=(
            "Many people have rated its {aspect}; on average {score}, on a scale from {low} (worst) to {high} (best), "
            "which is {word}. "
        ),
        describe=(
            "Describe its {aspect} in two to four sentences: {look_at}. Name what is visible in this very image and "
            "explains {reason}, first what weighs most. "
        ),
        look_at={
            Aspect.QUALITY: "sharpness, noise, exposure, colours, composition, and any artefact or distortion",
            Aspect.CORRESPONDENCE: (
                "which objects, attributes, numbers, relations and style of the prompt are there, and which are "
                "missing or wrong"
            ),
            Aspect.AUTHENTICITY: (
                "how real it looks: anatomy, shapes, textures, light, physics, text, and whatever gives it away"
            ),
        },
        silence=(
            "Write as one who only sees the image: do not mention that anybody rated it, write no score and no number "
            f"that stands for one, and do not sum up with any of the words {_WORDS}. "
        ),
        answer=(
            'Answer with JSON of two keys: "description", that text, and "rating", the one of '
            f"{_WORDS} that a careful reader of the text alone would choose."
        ),
        again="That answer cannot be used: {reason}. Give another one, and keep to all that was asked.",
    ),
}


class Answer(BaseModel):
    """A teacher's answer: the description, and the rating word that it implies."""

    model_config = ConfigDict(extra="ignore")

    description: str
    rating: Literal["bad", "poor", "fair", "good", "excellent"]

    @field_validator("rating", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.strip().lower() if isinstance(value, str) else value

    @field_validator("description")
    @classmethod
    def _some(cls, value: str) -> str:
        text = " ".join(value.split())
        if not text:
            raise ValueError("is empty")
        return text


SCHEMA: dict[str, Any] = {
    "name": "description",
    "strict": True,
    "schema": {
        "type": "object",
        "properties": {
            "description": {"type": "string"},
            "rating": {"type": "string", "enum": list(RATING_WORDS)},
        },
        "required": ["description", "rating"],
        "additionalProperties": False,
    },
}
"""For `response_format`: keywords that not all servers know, such as lengths, are left to `Answer`."""


@dataclass(frozen=True)
class Prompter:
    """Puts requests into words.

    Attributes:
        scale: lowest and highest score. detail: how closely an OpenAI model looks.
    """

    version: str
    scale: tuple[float, float]
    blind: bool
    detail: str

    def text(self, task: Task) -> str:
        """The request for one image and aspect, the image apart."""
        wording = TEACHER_WORDINGS[self.version]
        # str.replace for the prompt, not str.format: it may hold braces.
        parts = [] if task.prompt is None else [wording.origin.replace("{prompt}", task.prompt)]
        if not self.blind:
            low, high = self.scale
            parts.append(
                wording.told.format(
                    aspect=task.aspect, score=shown(task.score), low=f"{low:g}", high=f"{high:g}", word=task.word
                )
            )
        reason = f"how good or bad its {task.aspect} is" if self.blind else "that judgement"
        look_at = wording.look_at[task.aspect]
        parts.append(wording.describe.format(aspect=task.aspect, look_at=look_at, reason=reason))
        return "".join([*parts, wording.silence, wording.answer])

    def messages(self, task: Task, image_url: str, refused: tuple[str, str] | None = None) -> list[dict[str, Any]]:
        """The messages of a request.

        Args:
            image_url: the image as a data URL.
            refused: an earlier answer and what is wrong with it, when it is asked again.
        """
        wording = TEACHER_WORDINGS[self.version]
        content = [
            {"type": "image_url", "image_url": {"url": image_url, "detail": self.detail}},
            {"type": "text", "text": self.text(task)},
        ]
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": wording.system},
            {"role": "user", "content": content},
        ]
        if refused is not None:
            answer, reason = refused
            messages.append({"role": "assistant", "content": answer})
            messages.append({"role": "user", "content": wording.again.replace("{reason}", reason)})
        return messages

    def digest(self, task: Task) -> str:
        """Equal where the same is asked: an answer to something else is not taken for one to this."""
        return hashlib.sha256(self.text(task).encode()).hexdigest()[:12]


def shown(score: float) -> str:
    """A score as the teacher is told it, to two decimals."""
    return f"{score:.2f}".rstrip("0").rstrip(".")


_FENCED = re.compile(r"```(?:json)?\s*(.*?)```", re.DOTALL)


def read_answer(text: str) -> Answer:
    """Reads a teacher's answer: JSON, alone or in the midst of other words.

    Raises:
        ValueError: says on one line what is wrong with it.
    """
    fenced = _FENCED.search(text)
    body = fenced.group(1) if fenced else text
    start, end = body.find("{"), body.rfind("}")
    if start < 0:
        raise ValueError("it holds no JSON object")
    try:
        data = json.loads(body[start : end + 1] if end > start else body[start:])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its JSON is broken or cut off ({error})") from None
    try:
        return Answer.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
