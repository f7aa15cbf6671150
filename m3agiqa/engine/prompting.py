"""From a conversation to token ids, the same way for every engine and for training.

The chat template of the model decides the layout. Text of users can hold what looks like control
(`<image>`, `<|im_start|>`): it is cut inside each such string before tokenising, so that it stays
text whatever the tokenizer. Text without it is tokenised in one piece, exactly as the model's own
processor does it.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from m3agiqa.aspects import RATING_WORDS
from m3agiqa.config import ModelConfig
from m3agiqa.conversation import Questions
from m3agiqa.errors import UserError
from m3agiqa.models import takes_images

# Private-use characters: no chat template and no tokenizer's vocabulary gives them a meaning.
_CUT = "\ue0c7"
_ANSWER = "\ue0a1"


class PromptBuilder:
    """Builds the token ids of both rounds for one model.

    Args:
        tokenizer: a transformers tokenizer with a chat template, or the processor's template below.
        chat_template: the template, where the tokenizer has none of its own.
        image_token: the string that stands for the image in the rendered text (`<image>`); None: the
            conversations have no image.
        content_parts: whether the template takes a message's content as a list of parts (most
            multimodal templates) or as one string (MiniCPM-V 2.5), with the image token in it.
    """

    def __init__(
        self, tokenizer: Any, *, image_token: str | None, chat_template: str | None = None, content_parts: bool = True
    ) -> None:
        self.tokenizer = tokenizer
        self.image_token = image_token
        self._template = chat_template
        self._content_parts = content_parts
        self._guarded = sorted((t.content for t in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        if image_token is not None and image_token not in self._guarded:
            self._guarded.insert(0, image_token)

    @cached_property
    def image_token_id(self) -> int:
        """The id of the image placeholder; only where there is one."""
        return int(self.tokenizer.convert_tokens_to_ids(self.image_token))

    def first_round(self, questions: Questions) -> list[int]:
        """Token ids of [image, question 1], or of question 1 alone, up to where the description begins."""
        return self._encode(self._render([self._user(questions.first, image=True)], generate=True), bos=True)

    def second_round(self, questions: Questions) -> list[int]:
        """Token ids that follow the description: its end, question 2, up to where the rating begins."""
        messages = [
            self._user(questions.first, image=True),
            {"role": "assistant", "content": self._content(_ANSWER)},
            self._user(questions.second, image=False),
        ]
        rendered = self._render(messages, generate=True)
        return self._encode(rendered.split(_ANSWER, 1)[1])

    def answer(self, text: str) -> list[int]:
        """Token ids of an assistant's answer as the template places it, without its end token.

        Text that looks like control is text here too: an answer may come from a corpus.
        """
        before, _ = self._around_answer
        # The blank that a template puts before an answer belongs to the answer's first token.
        return self._encode(before + self._cut(text.strip()))

    @cached_property
    def end_of_answer(self) -> list[int]:
        """Token ids that close an answer in the template (the end-of-turn token first)."""
        return self._encode(self._around_answer[1])

    @cached_property
    def rating_ids(self) -> tuple[tuple[int, ...], ...]:
        """Token ids of the five rating words at the answer position, *bad* to *excellent*."""
        return tuple(tuple(self.answer(word)) for word in RATING_WORDS)

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids of every added token: what an answer may not hold, the end of turn apart."""
        return frozenset(int(i) for i in self.tokenizer.added_tokens_decoder)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the tokenizer's EOS and the template's end-of-turn token."""
        ids = [self.tokenizer.eos_token_id, *self.end_of_answer[:1]]
        return tuple(dict.fromkeys(int(i) for i in ids if i is not None and i in self.control_ids))

    def split_end(self, ids: Sequence[int]) -> tuple[list[int], bool]:
        """An answer's ids without its end token, and whether it has none: it was cut at its limit."""
        if ids and ids[-1] in self.stop_ids:
            return list(ids[:-1]), False
        return list(ids), True

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    @cached_property
    def _around_answer(self) -> tuple[str, str]:
        """What the template puts between the generation prompt and an answer, and after it."""
        user = self._user("q", image=False)
        opened = self._render([user], generate=True)
        closed = self._render([user, {"role": "assistant", "content": self._content(_ANSWER)}], generate=False)
        before, after = closed.split(_ANSWER, 1)
        # A template whose generation prompt differs from its history has no blank to speak of.
        return (before[len(opened) :] if before.startswith(opened) else ""), after

    def _content(self, text: str) -> str | list[dict[str, str]]:
        return [{"type": "text", "text": text}] if self._content_parts else text

    def _user(self, text: str, *, image: bool) -> dict[str, Any]:
        text = self._cut(text)
        if not image or self.image_token is None:
            return {"role": "user", "content": self._content(text)}
        # Cut after the placeholder too: joined with the line break it would be other tokens, and vLLM
        # would look for it in the text instead, where a user's control strings are control again.
        if self._content_parts:
            return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        return {"role": "user", "content": f"{self.image_token}{_CUT}\n{text}"}

    def _cut(self, text: str) -> str:
        text = text.replace(_CUT, "").replace(_ANSWER, "")
        for token in self._guarded:
            if len(token) > 1 and token in text:
                text = text.replace(token, token[0] + _CUT + token[1:])
        return text

    def _render(self, messages: list[dict[str, Any]], *, generate: bool) -> str:
        kwargs = {} if self._template is None else {"chat_template": self._template}
        return str(
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate, **kwargs)
        )

    def _encode(self, text: str, *, bos: bool = False) -> list[int]:
        ids: list[int] = []
        for piece in text.split(_CUT):
            ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        bos_id = self.tokenizer.bos_token_id
        # Templates of some models write BOS themselves, others leave it to the tokenizer.
        if bos and bos_id is not None and getattr(self.tokenizer, "add_bos_token", False) and ids[:1] != [bos_id]:
            ids.insert(0, bos_id)
        return ids


def load_processor(folder: Path, config: ModelConfig) -> Any:
    """The transformers processor of a checkpoint (tokenizer and image processor).

    Raises:
        UserError: if it needs a package that is not installed (that of Qwen-VL needs torchvision, say).
    """
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except ImportError as error:
        reason = str(error).strip().split(". ")[0]
        rule = f"its processor needs a package that is not installed ({reason})"
        raise UserError(f"model.path={config.path}", rule, "install that, or give another model") from error


def load_tokenizer(folder: Path, config: ModelConfig) -> Any:
    """The transformers tokenizer of a checkpoint."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)


def prompt_builder(
    folder: Path, config: ModelConfig, processor: Any = None, *, text_only: bool = False
) -> PromptBuilder:
    """The prompt builder of a checkpoint, of conversations without an image where they are `text_only`.

    Raises:
        UserError: if there is no chat template, or the image's placeholder cannot be told.
    """
    if processor is None:
        # The tokenizer is enough where the placeholder is given, and needs less of the checkpoint's own code.
        enough = config.image_token or (text_only and not takes_images(folder))
        processor = load_tokenizer(folder, config) if enough else load_processor(folder, config)
    tokenizer = getattr(processor, "tokenizer", processor)
    template = tokenizer.chat_template or getattr(processor, "chat_template", None)
    if template is None:
        raise UserError(f"model.path={config.path}", "has no chat template", "give an instruction-tuned checkpoint")
    if text_only:
        # Templates of language models take a text; one given as parts they would print as a Python list.
        parts = config.content_parts and takes_images(folder)
        return PromptBuilder(tokenizer, image_token=None, chat_template=template, content_parts=parts)
    image_token = config.image_token or getattr(processor, "image_token", None)
    if image_token is None:
        cure = "set model.image_token, or corpus.text_only=true for conversations without images"
        raise UserError(f"model.path={config.path}", "its processor names no image placeholder", cure)
    return PromptBuilder(
        tokenizer, image_token=str(image_token), chat_template=template, content_parts=config.content_parts
    )
