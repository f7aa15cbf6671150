"""Which adapters are read, and which are refused, for their files or for their model."""

import contextlib
import shutil

import pytest

from m3agiqa.adapters import load_adapters, vllm_lora_args
from m3agiqa.aspects import Aspect
from m3agiqa.config import ModelConfig
from m3agiqa.errors import UserError
from m3agiqa.models import model_folder
from tests.adapters.adapter_helpers import edited, renamed, write_adapter


class TestLoading:
    def test_none(self, model):
        assert load_adapters(None, model) == {}
        assert load_adapters("auto", model) == {}
        assert vllm_lora_args({}) == {}

    def test_the_embedded_model_brings_its_own(self):
        folder = model_folder(ModelConfig())
        assert set(load_adapters("auto", folder)) == set(Aspect)
        assert load_adapters(None, folder) == {}

    def test_one_for_all_aspects_is_one_object(self, model, adapter):
        loaded = load_adapters(str(adapter), model)
        assert list(loaded) == list(Aspect)
        assert len({id(a) for a in loaded.values()}) == 1
        found = loaded[Aspect.QUALITY]
        assert (found.folder, found.rank) == (adapter.resolve(), 8)
        assert found.name.isidentifier()
        assert len(found.lora_modules) == 14

    def test_one_per_aspect(self, model, adapter, tmp_path):
        same = shutil.copytree(adapter, tmp_path / "copy")
        other = write_adapter(model, tmp_path / "other", seed=1, r=12)
        loaded = load_adapters({"quality": str(adapter), "authenticity": str(other)}, model)
        assert set(loaded) == {Aspect.QUALITY, Aspect.AUTHENTICITY}
        assert loaded[Aspect.QUALITY].digest != loaded[Aspect.AUTHENTICITY].digest
        args = vllm_lora_args(loaded)
        assert (args["enable_lora"], args["max_loras"], args["max_lora_rank"]) == (
            True,
            3,
            16,
        )  # one slot stays empty: see vllm_lora_args
        equal = load_adapters({"quality": str(adapter), "correspondence": str(same), "authenticity": None}, model)
        assert set(equal) == {Aspect.QUALITY, Aspect.CORRESPONDENCE}
        assert equal[Aspect.QUALITY] is equal[Aspect.CORRESPONDENCE]
        assert vllm_lora_args(equal)["max_loras"] == 2

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("/no/such/folder", r"adapters=/no/such/folder: is no folder; give an adapter's folder or a hub id"),
            ("no-such-owner-x/y", r"adapters=no-such-owner-x/y: is neither a folder.*local folder"),
            ({"sharpness": "x"}, r"adapters\.sharpness: is no aspect; the aspects are quality, correspondence"),
            ({"quality": ""}, r"adapters\.quality=: is no folder"),
        ],
    )
    def test_bad_values(self, model, value, expected):
        with pytest.raises(UserError, match=expected):
            load_adapters(value, model)

    @pytest.mark.parametrize(
        ("file", "content", "expected"),
        [
            ("adapter_config.json", None, "holds no adapter_config.json; give"),
            ("adapter_config.json", b"{", "adapter_config.json cannot be read"),
            ("adapter_config.json", b"\xff", "adapter_config.json cannot be read"),
            ("adapter_config.json", b"[]", "names no peft_type"),
            ("adapter_config.json", b"{}", "names no peft_type"),
            ("adapter_config.json", b'{"peft_type": "LOHA"}', "of the kind LOHA, and only LORA.*merge-adapter"),
            ("adapter_model.safetensors", None, "holds no adapter_model.safetensors; give a whole adapter"),
            ("adapter_model.safetensors", b"not a header", "adapter_model.safetensors cannot be read"),
        ],
    )
    def test_bad_files(self, model, adapter, tmp_path, file, content, expected):
        folder = shutil.copytree(adapter, tmp_path / "bad")
        (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
        with pytest.raises(UserError, match=rf"adapters={folder}: .*{expected}"):
            load_adapters(str(folder), model)

    def test_pickled_weights(self, model, adapter, tmp_path):
        folder = shutil.copytree(adapter, tmp_path / "pickled")
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        with pytest.raises(UserError, match="load it with PEFT and save it again"):
            load_adapters(str(folder), model)


class TestBaseModel:
    @pytest.mark.parametrize(
        ("size", "expected"),
        [
            (
                {"text_width": 128},
                r"q_proj \(for 192 x 192, in the model 128 x 128\)|down_proj \(for 192 x 512, in the model 128 x 512\)",
            ),
            ({"text_layers": 1}, r"model\.text_model\.layers\.1\.\S+ \(the model has none\).* and 4 more"),
        ],
    )
    def test_other_shapes(self, adapter, tmp_path, size, expected):
        from m3agiqa.tiny.architecture import Size, write_random_model

        other = write_random_model(tmp_path, Size(**({"vision_layers": 1, "text_layers": 2} | size)))
        with pytest.raises(UserError, match=rf"does not fit the model in {other}: .*{expected}.*; give it as model"):
            load_adapters(str(adapter), other)

    def test_other_weights(self, adapter, tmp_path):
        from m3agiqa.tiny.architecture import write_random_model

        other = write_random_model(tmp_path, seed=1)
        with pytest.raises(UserError, match=rf"was made for .*not for the model in {other}; .*base_model_name_or_path"):
            load_adapters(str(adapter), other)

    def test_the_same_weights_elsewhere(self, model, adapter, tmp_path):
        copy = shutil.copytree(model, tmp_path / "copy")
        (copy / "generation_config.json").write_text("{}")
        assert load_adapters(str(adapter), copy)

    @pytest.mark.parametrize(
        ("base", "fits"),
        [
            ("owner/Right", True),
            ("another/right", True),
            ("owner/wrong", False),
            ("/elsewhere/wrong", True),
            ("", True),
            (None, True),
        ],
    )
    def test_hub_names(self, model, adapter, tmp_path, base, fits):
        cached = shutil.copytree(model, tmp_path / "models--Owner--right" / "snapshots" / "0123")
        named = edited(adapter, tmp_path / "adapter", base_model_name_or_path=base)
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="was made for owner/wrong"):
            load_adapters(str(named), cached)

    def test_names_of_other_versions_fit(self, model, adapter, tmp_path):
        older = renamed(adapter, tmp_path / "older", "model.text_model.", "text_model.model.")
        assert load_adapters(str(older), model)
