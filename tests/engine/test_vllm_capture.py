"""Capture in a real vLLM engine on the CPU, held against transformers in float32."""

import asyncio
import importlib
import importlib.util
import sys
from typing import ClassVar, NamedTuple

import pytest
import torch
from PIL import Image

from m3agiqa.aspects import Aspect
from m3agiqa.engine.shared_states import StatesLost
from m3agiqa.errors import UserError
from tests.engine.capture_helpers import (
    Captured,
    CapturingEngine,
    Comparison,
    Oracle,
    capturing_engine,
    random_images,
    write_random_adapter,
)

pytest_asyncio = pytest.importorskip("pytest_asyncio")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
slow_on_one_loop = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="class")]

IMAGES = 32
EXACT = 1e-4
"""Largest error of states, as a share of the largest value; in float32, as all here is unless it says otherwise."""
FOLDED = 1e-5
"""The same of folded projections."""


class Talk(NamedTuple):
    image: Image.Image
    aspect: Aspect
    captured: Captured


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from m3agiqa.tiny.architecture import write_random_model

    return write_random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {aspect: write_random_adapter(model, folder / aspect, seed) for seed, aspect in enumerate(Aspect)}


@pytest.fixture(scope="module")
def oracle(model, adapters):
    return Oracle(model, adapters)


@pytest.fixture(scope="module")
def requests(adapters):
    """By aspect, its adapter as vLLM asks for it."""
    from vllm.lora.request import LoRARequest

    return {aspect: LoRARequest(str(aspect), n, str(path)) for n, (aspect, path) in enumerate(adapters.items(), 1)}


async def converse_all(engine: CapturingEngine, images, requests=None, **kwargs) -> list[Talk]:
    """All images and aspects at once, an image's aspects one after the other; each under its adapter, or none."""

    async def one(image: Image.Image, aspect: Aspect) -> Talk:
        lora = None if requests is None else requests[aspect]
        return Talk(image, aspect, await engine.converse(image, aspect, lora=lora, **kwargs))

    return await asyncio.gather(*(one(image, aspect) for image in images for aspect in Aspect))


def compare_all(oracle: Oracle, talks: list[Talk], *, adapted: bool) -> list[Comparison]:
    return [oracle.compare(talk.captured, talk.image, talk.aspect if adapted else None) for talk in talks]


def assert_exact(found: list[Comparison]) -> None:
    assert all(one.same_prompt for one in found)
    assert sum(one.wrong for one in found) == 0
    assert sum(one.ties for one in found) <= 1 + sum(one.tokens for one in found) // 100, "too many that may be either"
    # Not their maximum, which may pass over a NaN.
    assert [one.states for one in found if not one.states < EXACT] == []
    assert [one.folding for one in found if not one.folding < FOLDED] == []
    assert [one.projections for one in found if not one.projections < FOLDED] == []


def assert_cut_answers_say_so(talks: list[Talk], limits: tuple[int, int], ends: list[int]) -> None:
    """An answer ends at the first token that may end one, or else at its limit, and says which."""
    reasons = []
    for talk in talks:
        for (tokens, reason), limit in zip(talk.captured.answers, limits, strict=True):
            assert not set(tokens[:-1]) & set(ends)
            assert reason == ("stop" if tokens[-1] in ends else "length")
            assert len(tokens) <= limit if reason == "stop" else len(tokens) == limit
            reasons.append(reason)
    assert min(reasons.count("stop"), reasons.count("length")) > len(talks) // 10


async def abort_some(engine: CapturingEngine, oracle: Oracle, requests, *, first: int, second: int) -> None:
    """Gives up all requests but one, in either round, with and without adapters; the engine goes on."""
    kinds = [None, *Aspect] * 3
    images = random_images(len(kinds), seed=4)
    between = [asyncio.Event() for _ in images]

    def begin(number: int, **kwargs):
        kind = kinds[number]
        return engine.converse(images[number], kind or Aspect.QUALITY, lora=requests.get(kind), **kwargs)

    tasks = [
        asyncio.create_task(begin(number, first=first, second=second, between=event))
        for number, event in enumerate(between)
    ]
    await asyncio.sleep(0)  # They begin; the first four end in round 1.
    cancelled = [task.cancel() for task in tasks[:4]]
    # The others end in round 2, before or after their states have left; on a machine that holds up this process
    # and not the engine's, one may have its answer first.
    for number in range(4, len(tasks) - 1):
        await between[number].wait()
        await asyncio.sleep(0.01 * (number % 3))
        cancelled.append(tasks[number].cancel())
    assert all(cancelled[:4])
    assert any(cancelled[4:])
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(r, asyncio.CancelledError) for r in results] == [*cancelled, False]
    left = [(len(tasks) - 1, results[-1]), *[(number, await begin(number)) for number in range(4)]]
    assert_exact([oracle.compare(captured, images[number], kinds[number]) for number, captured in left])
    assert engine.unread() == []


class TestEngine:
    """One engine with adapters allowed, default sizes, prefix caching."""

    pytestmark = slow_on_one_loop

    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    async def engine(self, model):
        async with capturing_engine(model, enable_lora=True, max_loras=3, max_lora_rank=8) as engine:
            yield engine

    @pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapters"])
    async def test_equal_to_transformers_and_peft(self, engine, oracle, requests, adapted):
        images = random_images(IMAGES)
        assert len({image.size for image in images}) == IMAGES
        ends = engine.some_ends(every=20)
        talks = await converse_all(engine, images, requests if adapted else None, ends=ends)
        assert len(talks) == IMAGES * len(Aspect)
        assert sum(t.captured.cached for t in talks) > len(talks) * 32, "the prefix cache was not used"
        assert_exact(compare_all(oracle, talks, adapted=adapted))
        assert_cut_answers_say_so(talks, (12, 3), ends)
        assert engine.unread() == []
        if adapted:
            assert min(one.states for one in compare_all(oracle, talks, adapted=False)) > 0.01, "adapters do nothing"

    async def test_wholly_cached_prompt(self, engine, oracle):
        (image,) = random_images(1, seed=1)
        first = await engine.converse(image, Aspect.QUALITY)
        again = await engine.converse(image, Aspect.QUALITY)
        assert again.cached >= len(again.ids) // 32 * 32 - 32
        assert_exact([oracle.compare(first, image), oracle.compare(again, image)])

    async def test_idle_engine_has_delivered_when_the_request_returns(self, engine):
        from m3agiqa.engine.vllm_capture import request_extra_args

        (image,) = random_images(1, seed=2)
        described = await engine.describe(image, Aspect.QUALITY)
        with engine.inbox.ask() as ticket:
            output = await engine.generate(described.prompt, image, 1, extra=request_extra_args(ticket))
            assert ticket.read(timeout_s=0).shape[0] == len(output.prompt_token_ids)

    async def test_request_that_does_not_ask_gets_nothing(self, engine):
        (image,) = random_images(1, seed=3)
        with engine.inbox.ask() as ticket:
            await engine.describe(image, Aspect.QUALITY)
            with pytest.raises(StatesLost, match=r"within 0\.2 s"):
                await ticket.receive(timeout_s=0.2)
        assert engine.unread() == []

    async def test_aborted_requests_leave_nothing_behind(self, engine, oracle, requests):
        await abort_some(engine, oracle, requests, first=20, second=200)


class TestCrowdedEngine:
    """Steps so short that prompts are cut in three or more, and a cache so small that requests are preempted.

    Prompts among them whose states are wanted: they begin again, in other blocks of the cache.
    """

    pytestmark = slow_on_one_loop
    STEP: ClassVar[int] = 24

    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    async def engine(self, model):
        sizes = {"max_model_len": 320, "max_num_batched_tokens": self.STEP, "num_gpu_blocks_override": 16}
        adapters = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8}
        async with capturing_engine(model, max_num_seqs=16, **sizes, **adapters) as engine:
            yield engine

    @pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapters"])
    async def test_chunked_and_preempted_prompts(self, engine, oracle, requests, adapted):
        ends, limits = engine.some_ends(every=100), (32, 48)
        asked = {"first": limits[0], "second": limits[1], "ends": ends}
        talks = await converse_all(engine, random_images(IMAGES, seed=6), requests if adapted else None, **asked)
        found = [talk.captured for talk in talks]
        assert min(c.opened for c in found) > 2 * self.STEP, "a prompt of round 1 is not cut"
        assert sum(len(c.ids) - c.cached > 2 * self.STEP for c in found) > len(found) // 2, "nor are those of round 2"
        assert sum(c.preempted for c in found) > 0
        assert_exact(compare_all(oracle, talks, adapted=adapted))
        assert_cut_answers_say_so(talks, limits, ends)
        assert engine.unread() == []

    async def test_aborted_requests_leave_nothing_behind(self, engine, oracle, requests):
        await abort_some(engine, oracle, requests, first=20, second=150)


class TestHalfPrecision:
    pytestmark = slow_on_one_loop

    async def test_bfloat16(self, model, oracle):
        images = random_images(4, seed=7)
        async with capturing_engine(model, dtype="bfloat16") as engine:
            talks = await converse_all(engine, images)
        assert {talk.captured.states.dtype for talk in talks} == {torch.bfloat16}
        assert all(one.states < 0.05 for one in compare_all(oracle, talks, adapted=False))


@pytest.mark.slow
def test_model_without_capture_is_refused():
    from m3agiqa.engine.vllm_capture import capture_engine_args

    with pytest.raises(UserError, match=r"GPT2LMHeadModel.*engine\.kind=transformers"):
        capture_engine_args(["GPT2LMHeadModel"])


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu"])
def test_this_vllm_is_taken(monkeypatch, version):
    from m3agiqa.engine import vllm_plugins

    monkeypatch.setattr(vllm_plugins, "version", lambda name: version)
    assert vllm_plugins.check_vllm() == f"vllm {version}"


def test_plugin_imports_nothing_heavy():
    import subprocess

    code = "import sys, m3agiqa.engine.vllm_plugins; print([m for m in ('vllm', 'torch') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


PARENTS = {
    "Idefics3ForConditionalGeneration": "idefics3",
    "MiniCPMV": "minicpmv",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", PARENTS)
def test_registered_models_are_vllms_own_with_states(architecture):
    from vllm import ModelRegistry

    from m3agiqa.engine.vllm_plugins import MODELS, register

    assert list(MODELS) == list(PARENTS)
    if "VL" in architecture:
        pytest.importorskip("torchvision")  # without it: test_qwen_vl.py
    register()
    register()
    model = ModelRegistry._try_load_model_cls(architecture)
    assert model is not None
    vllms = importlib.import_module(f"vllm.model_executor.models.{PARENTS[architecture]}")
    assert issubclass(model, getattr(vllms, architecture))
    assert model.__name__.endswith("WithStates")


@pytest.mark.slow
def test_minicpmv_of_any_version_keeps_states(monkeypatch):
    from types import SimpleNamespace

    from vllm.model_executor.models import minicpmv

    from m3agiqa.engine import vllm_models

    class Version(torch.nn.Module):
        packed_modules_mapping: ClassVar[dict] = {}
        embedding_modules: ClassVar[dict] = {}

        def __init__(self, *, vllm_config, prefix=""):
            super().__init__()

    kept = []
    monkeypatch.setitem(minicpmv._SUPPORT_VERSION, (2, 5), Version)
    monkeypatch.setattr(vllm_models, "keep_states", lambda model, config: kept.append(model))
    config = SimpleNamespace(model_config=SimpleNamespace(hf_config=SimpleNamespace(hidden_size=64, query_num=96)))
    model = vllm_models.MiniCPMVWithStates(vllm_config=config)
    assert type(model) is Version
    assert kept == [model]
