"""The teacher behind its API: one request, its answer, and what a refusal means. The only file that knows the key."""

import asyncio
import email.utils
import json
import math
import os
import time
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from m3agiqa.corpus.rows import shorten
from m3agiqa.distil.journal import Usage
from m3agiqa.distil.prompts import SCHEMA
from m3agiqa.distil_config import TeacherConfig
from m3agiqa.errors import UserError

_FORMATS = ("json_schema", "json_object", "text")
_BUSY = {408, 409, 425, 429}
_NO_MONEY = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "insufficient_balance"}
_POLICY = ("content_policy", "content_filter", "moderation", "safety", "responsibleaipolicy")


class Retry(Exception):
    """The request may be answered later; `after` is how many seconds the server asks to wait, if it does."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class Failed(Exception):
    """The request was not answered, and would not be now."""


class Declined(Exception):
    """The server will not answer this request: its policy forbids it."""


class FormatRefused(Exception):
    """The server does not take the `response_format`."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Message(_Part):
    content: str | None = None
    refusal: str | None = None


class _Choice(_Part):
    message: _Message
    finish_reason: str | None = None


class _Cached(_Part):
    cached_tokens: int | None = None


class _Usage(_Part):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Cached | None = None


class _Completion(_Part):
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


@dataclass(frozen=True)
class Reply:
    """An answer as it came. `refusal` is what a model says that will not answer; `usage` None: not told."""

    content: str
    refusal: str | None
    finish_reason: str | None
    usage: Usage | None


def read_key(config: TeacherConfig) -> str | None:
    """The key, from the environment and nowhere else; None where the server wants none.

    Raises:
        UserError: if it is not there, cannot be sent, or stands in the configuration too. The message does not hold it.
    """
    if config.key_env is None:
        return None
    key = os.environ.get(config.key_env, "").strip()
    if not key:
        cure = f"export {config.key_env}=..., or set teacher.key_env (null: a server without one)"
        raise UserError(config.key_env, "is not set, and holds the teacher's key", cure)
    # The HTTP client would name what it cannot send.
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(config.key_env, "holds characters that no key has", "set it to the key alone")
    # As it would be written into distil.json, where quotes are escaped.
    if json.dumps(key)[1:-1] in json.dumps(config.extra, default=str):
        cure = f"leave it out there: {config.key_env} is sent with each request"
        raise UserError("teacher.extra", f"holds the key of {config.key_env}, which would be written down", cure)
    return key


class Teacher:
    """Asks one model of one server.

    Args:
        longest_retry_after_s: a server that asks to wait longer ends the run.

    Attributes:
        client: of the `openai` package, for what else the API offers.

    Raises:
        UserError: if the key or the package is missing.
    """

    def __init__(self, config: TeacherConfig, longest_retry_after_s: float) -> None:
        self._config, self._longest = config, longest_retry_after_s
        self._key = read_key(config)
        try:
            import openai
        except ImportError:
            raise UserError("m3agiqa distil", "needs the package openai", "pip install m3agiqa[train]") from None
        self._openai = openai
        # Retries are ours: they count against the rate limits, and the run ends through them.
        self.client: Any = openai.AsyncOpenAI(
            api_key=self._key or "none", base_url=config.base_url, max_retries=0, timeout=config.timeout_s
        )
        self._formats = list(_FORMATS) if config.response_format == "auto" else [config.response_format]

    @property
    def name(self) -> str:
        """How errors name it."""
        return f"teacher {self._config.model} at {self._config.base_url}"

    async def close(self) -> None:
        """Closes its connections."""
        await self.client.close()

    def body(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """The body of a request, JSON being asked for in the best way that the server is known to take."""
        body: dict[str, Any] = {
            "model": self._config.model,
            "messages": messages,
            self._config.output_limit_key: self._config.max_output_tokens,
        }
        if self._config.temperature is not None:
            body["temperature"] = self._config.temperature
        if self._formats[0] == "json_schema":
            body["response_format"] = {"type": "json_schema", "json_schema": SCHEMA}
        elif self._formats[0] == "json_object":
            body["response_format"] = {"type": "json_object"}
        return body | self._config.extra

    async def ask(self, messages: list[dict[str, Any]]) -> Reply:
        """One request; another at once where only the `response_format` was refused.

        Raises:
            Retry, Failed, Declined: what the server did instead of answering.
            UserError: what no request will get past: the key, the quota, the address.
        """
        while True:
            body = self.body(messages)
            try:
                return await self._send(body)
            except FormatRefused as error:
                if not self.step_down(body):
                    raise Failed(str(error)) from None

    def step_down(self, body: Mapping[str, Any]) -> bool:
        """Asks for JSON in a lesser way than in this body from now on. Returns whether there is one."""
        kind = body.get("response_format", {}).get("type", "text")
        if kind == self._formats[0]:
            if len(self._formats) == 1:
                return False
            self._formats.pop(0)
        return True

    async def _send(self, body: dict[str, Any]) -> Reply:
        # As it came: servers differ in what they leave out, and the client's types want it all.
        create = self.client.chat.completions.with_raw_response.create
        raw = await self.call(create(model=body["model"], messages=body["messages"], extra_body=body))
        return self.read(raw.content)

    async def call(self, request: Awaitable[Any], timeout_s: float | None = None) -> Any:
        """Awaits what the client returns for one request; its errors become ours.

        Raises:
            Retry, Failed, Declined, FormatRefused, UserError: see `refusal`.
        """
        openai, limit = self._openai, timeout_s or self._config.timeout_s
        try:
            async with asyncio.timeout(limit):
                return await request
        except (TimeoutError, openai.APITimeoutError):
            raise Retry(f"no answer within {limit:g} s") from None
        except openai.APIConnectionError as error:
            raise Retry(f"cannot be reached ({self.clean(error.__cause__ or error)})") from None
        except openai.APIStatusError as error:
            raise self.refusal(error.status_code, error.body, error.response.headers) from None
        except openai.OpenAIError as error:
            raise Retry(self.clean(error)) from None

    def read(self, data: bytes | str | dict[str, Any]) -> Reply:
        """An answer from the JSON of a chat completion.

        Raises:
            Retry: if it is none.
        """
        try:
            if isinstance(data, dict):
                found = _Completion.model_validate(data)
            else:
                found = _Completion.model_validate_json(data)
        except ValidationError as error:
            raise Retry(f"sends what is no chat completion ({self.clean(error)})") from None
        choice, usage = found.choices[0], found.usage
        tokens = None
        if usage is not None:
            cached = usage.prompt_tokens_details and usage.prompt_tokens_details.cached_tokens
            tokens = Usage(usage.prompt_tokens, usage.completion_tokens, cached or 0)
        content, refusal = choice.message.content or "", choice.message.refusal
        return Reply(self.redact(content), refusal and self.redact(refusal), choice.finish_reason, tokens)

    def refusal(self, status: int, body: object, headers: Mapping[str, str] | None = None) -> Exception:
        """What an HTTP status other than 200 means, as the error to raise.

        Args:
            body: the JSON of the answer, or its part `error`.
        """
        error = body.get("error", body) if isinstance(body, dict) else {}
        error = error if isinstance(error, dict) else {"message": error}
        codes = {str(error.get(key)).lower() for key in ("code", "type")}
        message = self.clean(str(error.get("message") or body or ""))
        if status == 401:
            shown = self._config.key_env or "teacher.key_env=null"
            return UserError(shown, f"{self._config.base_url} does not accept the key (HTTP 401)", "give a valid key")
        if status == 402 or codes & _NO_MONEY:
            return UserError(
                self.name, f"the quota is used up (HTTP {status})", "add credit, or wait for the next month"
            )
        if status in _BUSY or status >= 500:
            return self._busy(status, message, headers or {})
        if status in (403, 404):
            cure = "check teacher.base_url, teacher.model and what the key may use"
            return UserError(self.name, f"HTTP {status}: {message}", cure)
        lower = message.lower()
        if any(sign in text for sign in _POLICY for text in (*codes, lower)):
            return Declined(message)
        if any(sign in lower or sign in str(error.get("param")).lower() for sign in ("response_format", "json_schema")):
            return FormatRefused(f"HTTP {status}: {message}")
        return Failed(f"HTTP {status}: {message}")

    def _busy(self, status: int, message: str, headers: Mapping[str, str]) -> Exception:
        after = retry_after(headers)
        if after is not None and after > self._longest:
            rule = f"HTTP {status}, and asks to wait for {after:.0f} s"
            return UserError(self.name, rule, "come back then, or raise limits.longest_retry_after_s")
        return Retry(f"HTTP {status}: {message}" if message else f"HTTP {status}", after)

    def clean(self, error: BaseException | str) -> str:
        """A message on one line, without the key."""
        return shorten(self.redact(str(error) or type(error).__name__))

    def redact(self, text: str) -> str:
        """A text without the key, should a server send it back."""
        return text.replace(self._key, "***") if self._key else text


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait, by `retry-after-ms` or `Retry-After` (seconds or a date), or None."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * unit
        except (KeyError, ValueError):
            continue
        if math.isfinite(seconds):
            return max(seconds, 0.0)
    try:
        return max(email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time(), 0.0)
    except (KeyError, ValueError, TypeError):
        return None
