"""Adapters in transformers, and merged checkpoints held against them."""

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from m3agiqa import seen
from m3agiqa.adapters import add_to_transformers, load_adapters, merge_adapter, use_adapter
from m3agiqa.adapters.files import read_adapter
from m3agiqa.adapters.merge import check_merged
from m3agiqa.aspects import Aspect
from m3agiqa.errors import UserError
from tests.adapters.adapter_helpers import VISION, edited, load_base, logits, renamed, write_adapter


class TestTransformers:
    def test_each_aspect_has_its_own(self, model, adapter, inputs, tmp_path):
        other = write_adapter(model, tmp_path / "other", seed=1)
        loaded = load_adapters({"quality": str(adapter), "authenticity": str(other)}, model)
        base = load_base(model)
        plain = logits(base, inputs)
        peft_model = add_to_transformers(base, loaded)
        results = []
        for aspect in Aspect:
            with use_adapter(peft_model, loaded.get(aspect)):
                results.append(logits(base, inputs))
        assert torch.equal(results[1], plain)
        assert all((a - b).abs().max() > 0.01 for a, b in itertools.combinations(results, 2))

    def test_without_adapters(self):
        assert add_to_transformers(object(), {}) is None
        with use_adapter(None, None):
            pass

    def test_tensors_without_a_place(self, model, adapter, tmp_path):
        stray = renamed(adapter, tmp_path / "a", "text_model.layers", "text_model.model.layers")
        with pytest.raises(UserError, match="of its tensors have no place in the model"):
            add_to_transformers(load_base(model), load_adapters(str(stray), model))


class TestMerging:
    @pytest.mark.parametrize(
        "settings",
        [
            {"modules_to_save": ["modality_projection", "lm_head"]},
            {"target_modules": VISION, "use_rslora": True, "rank_pattern": {"fc1": 4}, "alpha_pattern": {"fc2": 3}},
            {"use_dora": True},
            {"bias": "all"},
            {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
            {"trainable_token_indices": {"embed_tokens": [1, 2]}},
            {"init_lora_weights": "pissa"},
        ],
        ids=lambda settings: "+".join(settings),
    )
    def test_equals_peft(self, model, inputs, tmp_path, settings):
        from peft import PeftModel

        adapter = write_adapter(model, tmp_path / "adapter", **settings)
        if settings.get("modules_to_save"):
            assert len(read_adapter(str(adapter), "adapters").full_tensors) == 2
        out = merge_adapter(str(model), str(adapter), tmp_path / "out")
        torch.manual_seed(0)
        expected = logits(PeftModel.from_pretrained(load_base(model), adapter).eval(), inputs)
        merged = logits(load_base(out), inputs)
        assert (merged - expected).abs().max() < 1e-4 * expected.abs().max()
        assert (merged - logits(load_base(model), inputs)).abs().max() > 0.01
        assert not list(tmp_path.glob(".out.*"))

    def test_files(self, model, adapter, tmp_path):
        from m3agiqa.config import ModelConfig
        from m3agiqa.engine.prompting import prompt_builder

        (source := tmp_path / "base").mkdir()
        shutil.copytree(model, source, dirs_exist_ok=True)
        (source / "modeling_own.py").write_text("x = 1\n")
        (source / ".cache").mkdir()
        (source / ".cache" / "x.json").write_text("{}")
        adapter = edited(adapter, tmp_path / "adapter")
        seen.seen(["a"], [], []).write(adapter / seen.FILE)
        seen.seen(["b"], [], []).write(source / seen.FILE)
        (tmp_path / "out").mkdir()
        out = merge_adapter(str(source), str(adapter), str(tmp_path / "out"), dtype="float32")
        names = {path.name for path in source.iterdir()} - {".cache"}
        assert seen.read(out).met("id", ["a", "b", "c"]) == ["a", "b"]
        assert {path.name for path in out.iterdir()} == names | {"m3agiqa_merge.json"}
        assert json.loads((out / "config.json").read_text()) == json.loads((source / "config.json").read_text())
        assert prompt_builder(out, ModelConfig(path=str(out)))
        record = json.loads((out / "m3agiqa_merge.json").read_text())
        assert record["checked_tensors"] == 4
        assert record["kept"] == pytest.approx(1, abs=1e-3)
        assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o644}

    def test_dtype(self, model, adapter, tmp_path):
        out = merge_adapter(str(model), str(adapter), tmp_path / "out", dtype="bfloat16")
        assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
        config = json.loads((out / "config.json").read_text())
        assert config["dtype"] == "bfloat16"
        assert all(
            section.get("dtype", "bfloat16") == "bfloat16" for section in config.values() if type(section) is dict
        )

    def test_an_update_lost_in_rounding(self, model, adapter, tmp_path):
        faint = edited(adapter, tmp_path / "faint", lora_alpha=0.001)
        with pytest.raises(UserError, match=r"dtype bfloat16: rounds away .*; merge with --dtype float32"):
            merge_adapter(str(model), str(faint), tmp_path / "out", dtype="bfloat16")
        assert [path.name for path in tmp_path.iterdir()] == ["faint"]

    def test_a_wrong_result_is_noticed(self, model, adapter, tmp_path):
        with pytest.raises(RuntimeError, match="is not what base and adapter give"):
            check_merged(model, read_adapter(str(adapter), "adapters"), model)
        twice = read_adapter(str(edited(adapter, tmp_path / "twice", lora_alpha=32)), "adapters")
        out = merge_adapter(str(model), str(adapter), tmp_path / "out")
        with pytest.raises(RuntimeError):
            check_merged(model, twice, out)

    def test_refusals(self, model, adapter, tmp_path):
        from m3agiqa.tiny.architecture import Size, write_random_model

        (full := tmp_path / "full").mkdir()
        (full / "x").touch()
        with pytest.raises(UserError, match=r"--out .*not empty; give a new folder"):
            merge_adapter(str(model), str(adapter), full)
        with pytest.raises(UserError, match=r"--dtype int8: is not known"):
            merge_adapter(str(model), str(adapter), tmp_path / "out", dtype="int8")
        with pytest.raises(UserError, match=r"--adapter=/no/such: is no folder"):
            merge_adapter(str(model), "/no/such", tmp_path / "out")
        other = write_random_model(tmp_path / "other", Size(vision_layers=1, text_layers=1, text_width=128))
        with pytest.raises(UserError, match="does not fit the model"):
            merge_adapter(str(other), str(adapter), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_quantised_and_tied_models(self, model, adapter, tmp_path):
        headed = write_adapter(model, tmp_path / "headed", modules_to_save=["lm_head"])
        tied = shutil.copytree(model, tmp_path / "tied")
        tensors = load_file(model / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, tied / "model.safetensors", {"format": "pt"})
        edit = edited(headed, tmp_path / "edited", base_model_name_or_path=None)
        with pytest.raises(UserError, match="are one tensor in this model"):
            merge_adapter(str(tied), str(edit), tmp_path / "out")
        quantised = shutil.copytree(model, tmp_path / "quantised")
        config = json.loads((quantised / "config.json").read_text())
        (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": {}}))
        with pytest.raises(UserError, match="has quantised weights"):
            merge_adapter(str(quantised), str(adapter), tmp_path / "out")

    def test_kinds_that_cannot_be_merged(self, model, tmp_path):
        from peft import LoHaConfig, PromptTuningConfig, get_peft_model

        torch.manual_seed(0)
        loha = LoHaConfig(r=4, target_modules=["q_proj"], init_weights=False)
        get_peft_model(load_base(model), loha).save_pretrained(tmp_path / "loha")
        merge_adapter(str(model), str(tmp_path / "loha"), tmp_path / "out")
        prompt = PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=4, token_dim=192, num_layers=2, num_attention_heads=3
        )
        get_peft_model(load_base(model), prompt).save_pretrained(tmp_path / "prompt")
        with pytest.raises(UserError, match="PROMPT_TUNING, which cannot be merged"):
            merge_adapter(str(model), str(tmp_path / "prompt"), tmp_path / "out2")
