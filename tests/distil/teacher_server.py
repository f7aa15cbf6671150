"""A teacher on this machine that behaves as it is told: well, or as servers do on their worst days. It counts."""

import asyncio
import base64
import contextlib
import io
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from PIL import Image

from m3agiqa.aspects import Aspect

KEY = "sk-test-0123456789abcdef-secret"
"""The key that the server wants."""


@dataclass
class Ask:
    """One request for a description.

    Attributes:
        number: how many there have been for this prompt and aspect, this one included. at: when it came, in seconds.
    """

    body: dict[str, Any]
    prompt: str
    aspect: str
    number: int = 0
    at: float = field(default_factory=time.monotonic)

    @property
    def text(self) -> str:
        """The text of the request itself."""
        return self.body["messages"][1]["content"][1]["text"]

    @property
    def image(self) -> Image.Image:
        """The image that was sent."""
        url = self.body["messages"][1]["content"][0]["image_url"]["url"]
        return Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1])))

    @property
    def format(self) -> str:
        """How JSON is asked for."""
        return self.body.get("response_format", {}).get("type", "text")


@dataclass
class Say:
    """What to answer. `status` 0 closes the connection, and `hold` is awaited first."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    hold: float = 0.0


def completion(content: str | None, *, refusal: str | None = None, finish: str = "stop") -> Say:
    """A chat completion of 1,000 tokens in and 100 out."""
    message = {"role": "assistant", "content": content, "refusal": refusal}
    choices = [{"index": 0, "finish_reason": finish, "message": message}]
    usage = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
    return Say(body={"id": "c", "object": "chat.completion", "created": 1, "choices": choices, "usage": usage})


def described(text: str, rating: str = "fair") -> Say:
    """An answer in the form that is asked for."""
    return completion(json.dumps({"description": text, "rating": rating}))


def error(status: int, message: str = "no", headers: dict[str, str] | None = None, **more: str) -> Say:
    """An error as OpenAI words them."""
    return Say(status, {"error": {"message": message, **more}}, headers or {})


def good(ask: Ask) -> Say:
    """A usable description, rated as the teacher was told."""
    told = re.search(r"which is (\w+)\.", ask.text)
    return described(
        f"Soft edges and a smooth sky mark {ask.prompt}, seen for its {ask.aspect}.", told[1] if told else "fair"
    )


class TeacherServer:
    """A running server. A context manager.

    Attributes:
        behave: decides each answer. asks: all requests. paid: answers that were sent whole, by (prompt, aspect).
        files, batches: of the Batch API, by id. polls: how often a batch is looked at before it is done.
        ends: how the next batches end, and how many of their requests are answered by then; the others are completed.
        log: method and path of every request.
    """

    def __init__(self, behave: Callable[[Ask], Say] = good) -> None:
        self.behave = behave
        self.asks: list[Ask] = []
        self.paid: Counter[tuple[str, str]] = Counter()
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.polls = 2
        self.ends: list[tuple[str, int]] = []
        self.log: list[str] = []
        self.lose_the_answer_of: str | None = None
        self._seen: Counter[tuple[str, str]] = Counter()
        self._loop = asyncio.new_event_loop()

    def __enter__(self) -> "TeacherServer":
        started = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(30)
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)

    @property
    def url(self) -> str:
        """The base URL."""
        return f"http://127.0.0.1:{self.port}/v1"

    def asked(self, prompt: str, aspect: str = "quality") -> list[Ask]:
        """The requests for one description."""
        return [ask for ask in self.asks if (ask.prompt, ask.aspect) == (prompt, aspect)]

    def _serve(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application(client_max_size=2**28, middlewares=[self._front])
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/files", self._upload)
        app.router.add_get("/v1/files/{id}/content", self._download)
        app.router.add_post("/v1/batches", self._make_batch)
        app.router.add_get("/v1/batches", self._list_batches)
        app.router.add_get("/v1/batches/{id}", self._batch)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.port = site._server.sockets[0].getsockname()[1]
        started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())

    @web.middleware
    async def _front(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.log.append(f"{request.method} {request.path}")
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return web.json_response({"error": {"message": f"Incorrect API key: {KEY}"}}, status=401)
        response = await handler(request)
        if self.lose_the_answer_of == self.log[-1]:
            self.lose_the_answer_of = None
            request.transport.close()
        return response

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        ask = self._note(await request.json())
        say = self.behave(ask)
        if say.hold:
            await asyncio.sleep(say.hold)
        if say.status == 0:
            request.transport.close()
        data = say.body if isinstance(say.body, bytes) else json.dumps(say.body).encode()
        response = web.Response(
            body=data, status=say.status or 200, headers=say.headers, content_type="application/json"
        )
        if say.status == 200:
            with contextlib.suppress(ConnectionResetError):  # the client was killed
                await response.prepare(request)
                await response.write_eof()
                self.paid[ask.prompt, ask.aspect] += 1
        return response

    def _note(self, body: dict[str, Any]) -> Ask:
        text = body["messages"][1]["content"][1]["text"]
        prompt = re.search(r"image is: '(.*?)'\. ", text)
        aspect = next(a for a in Aspect if f"Describe its {a} " in text)
        ask = Ask(body, prompt[1] if prompt else "", str(aspect))
        self._seen[ask.prompt, ask.aspect] += 1
        ask.number = self._seen[ask.prompt, ask.aspect]
        self.asks.append(ask)
        return ask

    async def _upload(self, request: web.Request) -> web.Response:
        form = await request.post()
        name = f"file-{len(self.files)}"
        self.files[name] = form["file"].file.read()
        return web.json_response(self._file(name))

    def _file(self, name: str) -> dict[str, Any]:
        return {
            "id": name, "object": "file", "bytes": len(self.files[name]), "created_at": 1, "filename": "x.jsonl",
            "purpose": "batch", "status": "processed",
        }  # fmt: skip

    async def _download(self, request: web.Request) -> web.Response:
        return web.Response(body=self.files[request.match_info["id"]])

    async def _make_batch(self, request: web.Request) -> web.Response:
        body, name = await request.json(), f"batch_{len(self.batches)}"
        lines = self.files[body["input_file_id"]].splitlines()
        self.batches[name] = {
            "id": name, "object": "batch", "endpoint": body["endpoint"], "input_file_id": body["input_file_id"],
            "completion_window": "24h", "status": "in_progress", "created_at": 1, "metadata": body["metadata"],
            "request_counts": {"total": len(lines), "completed": 0, "failed": 0}, "polled": 0,
        }  # fmt: skip
        return web.json_response(self.batches[name])

    async def _list_batches(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": list(self.batches.values()), "has_more": False})

    async def _batch(self, request: web.Request) -> web.Response:
        batch = self.batches[request.match_info["id"]]
        batch["polled"] += 1
        if batch["polled"] >= self.polls and batch["status"] == "in_progress":
            self._complete(batch)
        return web.json_response(batch)

    def _complete(self, batch: dict[str, Any]) -> None:
        """Answers a batch's requests, as they would be answered one at a time, as far as it comes."""
        files: dict[str, list[str]] = {"output": [], "error": []}
        lines = self.files[batch["input_file_id"]].splitlines()
        batch["status"], answered = self.ends.pop(0) if self.ends else ("completed", len(lines))
        if batch["status"] == "failed":
            batch["errors"] = {"object": "list", "data": [{"code": "invalid", "line": 1, "message": "no such model"}]}
        for place, line in enumerate(lines):
            request = json.loads(line)
            if place >= answered:
                if batch["status"] == "expired":
                    late = {"code": "batch_expired", "message": "it was not executed in time"}
                    result = {"id": "b", "custom_id": request["custom_id"], "response": None, "error": late}
                    files["error"].append(json.dumps(result))
                continue
            ask = self._note(request["body"])
            say = self.behave(ask)
            response = {"status_code": say.status, "request_id": "r", "body": say.body}
            result = {"id": "b", "custom_id": request["custom_id"], "response": response, "error": None}
            files["output" if say.status == 200 else "error"].append(json.dumps(result))
            if say.status == 200:
                self.paid[ask.prompt, ask.aspect] += 1
        for kind, results in files.items():
            if results:
                name = f"file-{len(self.files)}"
                self.files[name] = "\n".join(results).encode()
                batch[f"{kind}_file_id"] = name
