"""Models whose images come in other forms: flat patches with a grid and features of several layers (Qwen3-VL)."""

import numpy as np
import pytest
import torch

from m3agiqa.aspects import Aspect
from m3agiqa.finetuning.encoding import Encoded, collate
from m3agiqa.finetuning.learner import Learner
from m3agiqa.finetuning.pictures import Prepared
from m3agiqa.finetuning.talks import Talk
from tests.finetuning.helpers import settings

IMAGE = 5


@pytest.fixture
def model():
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True
        },
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
        "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=6, vision_start_token_id=7,
        vision_end_token_id=8,
    )  # fmt: skip
    return Qwen3VLForConditionalGeneration(config).eval().requires_grad_(False)


def conversation(seed, grid):
    """A conversation about an image of grid rows and columns of patches, four of which are a token."""
    generator = torch.Generator().manual_seed(seed)
    tokens, patches = grid[0] * grid[1] // 4, grid[0] * grid[1]
    said = torch.randint(10, 60, (9 + seed,), generator=generator).tolist()
    ids = np.asarray([7, *[IMAGE] * tokens, 8, *said], np.int32)
    weights = np.asarray([0.0] * (tokens + 4) + [1.0] * (len(ids) - tokens - 4), np.float32)
    tensors = {
        "pixel_values": torch.randn(patches, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, *grid]]),
        "mm_token_type_ids": torch.ones(1, tokens, dtype=torch.long),
    }
    return Talk(seed, Aspect.QUALITY, None, "", "good", None), Encoded(ids, weights, len(ids) - 2), Prepared(tensors)


def test_a_batch_of_different_grids_is_its_rows_and_what_transformers_says(model):
    learner = Learner(model, settings("tiny", "lora.connector=false"), [10, 11, 12, 13, 14], IMAGE)
    assert learner.sees
    learner.eval()
    rows = [conversation(1, (2, 4)), conversation(2, (4, 4)), conversation(3, (2, 4)), conversation(4, (2, 8))]

    def outcome(chosen, look):
        talks, encoded, images = zip(*chosen, strict=True)
        if look:
            images = [
                Prepared({k: v for k, v in i.tensors.items() if k != "pixel_values"}, *learner.look([i.tensors]))
                for i in images
            ]
        pictures = {talk.picture: image for talk, image in zip(talks, images, strict=True)}
        with torch.no_grad():
            return learner(collate(talks, encoded, pictures, 0))

    for look in (False, True):
        together, alone = outcome(rows, look), [outcome([row], look) for row in rows]
        for name in ("loss", "weight", "ratings"):
            singly = torch.cat([getattr(one, name) for one in alone])
            torch.testing.assert_close(getattr(together, name), singly, rtol=1e-4, atol=1e-4)
    for (_, encoded, image), ours in zip(rows, alone, strict=True):
        ids = torch.tensor(encoded.ids)[None].long()
        labels = torch.where(torch.tensor(encoded.weights)[None] > 0, ids, -100)
        inputs = dict(image.tensors) | {"mm_token_type_ids": (ids == IMAGE).long()}
        with torch.no_grad():
            theirs = model(input_ids=ids, labels=labels, **inputs).loss
        assert float(ours.loss / ours.weight) == pytest.approx(float(theirs), rel=1e-4)


def test_its_vision_side_can_be_trained(model):
    learner = Learner(model, settings("tiny", "lora.vision=true"), [10, 11, 12, 13, 14], IMAGE)
    talk, encoded, image = conversation(1, (4, 4))
    learner(collate([talk], [encoded], {1: image}, 0)).loss.sum().backward()
    # At first a change is B @ A with B = 0, so that only B has a slope.
    moved = {
        name.split(".")[1] for name, one in learner.learnt().items() if one.grad is not None and bool(one.grad.any())
    }
    assert moved == {"visual", "language_model"}
