"""Capture in a real vLLM engine on the CPU, held against transformers in float32."""

import asyncio
import importlib
import importlib.util
import sys
from typing import ClassVar

import pytest
import torch

from m3agiqa.aspects import Aspect
from m3agiqa.engine.shared_states import StatesLost
from m3agiqa.errors import UserError
from tests.engine.capture_helpers import (
    Captured,
    CapturingEngine,
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


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from m3agiqa.tiny.architecture import write_random_model

    return write_random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {aspect: write_random_adapter(model, folder / aspect, seed) for seed, aspect in enumerate(Aspect)}


@pytest.fixture(scope="module")
def oracle(model):
    return Oracle(model)


async def converse_all(engine: CapturingEngine, images, aspects=tuple(Aspect), **kwargs) -> list[tuple[int, Captured]]:
    """All images and aspects at once; each conversation with its image's number."""

    async def one(number: int, aspect: Aspect) -> tuple[int, Captured]:
        return number, await engine.converse(images[number], aspect, **kwargs)

    return await asyncio.gather(*(one(number, aspect) for number in range(len(images)) for aspect in aspects))


class TestEngine:
    """One engine with adapters allowed, default sizes, prefix caching."""

    pytestmark = slow_on_one_loop

    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    async def engine(self, model):
        async with capturing_engine(model, enable_lora=True, max_loras=3, max_lora_rank=8) as engine:
            yield engine

    async def test_states_equal_transformers(self, engine, oracle):
        images = random_images(IMAGES)
        captured = await converse_all(engine, images)
        assert len(captured) == IMAGES * len(Aspect)
        assert sum(c.cached for _, c in captured) > len(captured) * 32, "the prefix cache was not used"
        assert max(oracle.error(c, images[number]) for number, c in captured) < EXACT
        assert engine.unread() == []

    async def test_wholly_cached_prompt(self, engine, oracle):
        (image,) = random_images(1, seed=1)
        first = await engine.converse(image, Aspect.QUALITY)
        again = await engine.converse(image, Aspect.QUALITY)
        assert again.cached >= len(again.ids) // 32 * 32 - 32
        assert oracle.error(first, image) < EXACT
        assert oracle.error(again, image) < EXACT

    async def test_idle_engine_has_delivered_when_the_request_returns(self, engine):
        from m3agiqa.engine.vllm_capture import request_extra_args

        (image,) = random_images(1, seed=2)
        prompt = await engine.describe(image, Aspect.QUALITY)
        with engine.inbox.ask() as ticket:
            output = await engine.generate(prompt, image, 1, extra=request_extra_args(ticket))
            assert ticket.read(timeout_s=0).shape[0] == len(output.prompt_token_ids)

    async def test_request_that_does_not_ask_gets_nothing(self, engine):
        (image,) = random_images(1, seed=3)
        with engine.inbox.ask() as ticket:
            await engine.describe(image, Aspect.QUALITY)
            with pytest.raises(StatesLost, match=r"within 0\.2 s"):
                await ticket.receive(timeout_s=0.2)
        assert engine.unread() == []

    async def test_aborted_requests_leave_nothing_behind(self, engine, oracle):
        images = random_images(12, seed=4)
        described = [asyncio.Event() for _ in images]
        tasks = [
            asyncio.create_task(engine.converse(image, Aspect.QUALITY, first=20, second=200, described=event))
            for image, event in zip(images, described, strict=True)
        ]
        await asyncio.sleep(0)  # They begin; the first four end in round 1.
        cancelled = [task.cancel() for task in tasks[:4]]
        # The others end in round 2, before or after their states have left; on a machine that holds up this process
        # and not the engine's, one may have its answer first.
        for number in range(4, len(tasks) - 1):
            await described[number].wait()
            await asyncio.sleep(0.01 * (number % 3))
            cancelled.append(tasks[number].cancel())
        assert all(cancelled[:4])
        assert any(cancelled[4:])
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(r, asyncio.CancelledError) for r in results] == [*cancelled, False]
        assert oracle.error(results[-1], images[-1]) < EXACT
        assert oracle.error(await engine.converse(images[0], Aspect.AUTHENTICITY), images[0]) < EXACT
        assert engine.unread() == []

    async def test_three_adapters_equal_peft(self, engine, model, adapters, oracle):
        from vllm.lora.request import LoRARequest

        images = random_images(8, seed=5)
        with_adapters = Oracle(model, adapters)
        captured = {}
        for n, (aspect, path) in enumerate(adapters.items(), start=1):
            request = LoRARequest(str(aspect), n, str(path))
            captured[aspect] = asyncio.create_task(converse_all(engine, images, (aspect,), lora=request))
        for aspect, task in captured.items():
            for number, c in await task:
                assert with_adapters.error(c, images[number], aspect) < EXACT
                assert oracle.error(c, images[number]) > 0.01, "the adapter had no effect"


class TestCrowdedEngine:
    """So few tokens per step that prompts are cut, and so small a cache that requests are preempted."""

    pytestmark = slow_on_one_loop

    async def test_chunked_and_preempted_prompts(self, model, oracle):
        images = random_images(8, seed=6)
        args = {"max_num_batched_tokens": 48, "max_num_seqs": 16, "max_model_len": 320, "num_gpu_blocks_override": 16}
        async with capturing_engine(model, **args) as engine:
            captured = await converse_all(engine, images, first=60, second=60)
            assert min(len(c.ids) for _, c in captured) > 2 * 48
            assert engine.preemptions[0] > 0
            assert max(oracle.error(c, images[number]) for number, c in captured) < EXACT
            assert engine.unread() == []


class TestHalfPrecision:
    pytestmark = slow_on_one_loop

    async def test_bfloat16(self, model, oracle):
        images = random_images(4, seed=7)
        async with capturing_engine(model, dtype="bfloat16") as engine:
            captured = await converse_all(engine, images)
        for number, c in captured:
            assert c.states.dtype == torch.bfloat16
            assert oracle.error(c, images[number]) < 0.05


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
