"""a, reference-style: as the published code scores. transformers at batch 1; per image and aspect the image is
encoded and read twice: for `generate`, then for a full forward with the logits of all positions written
out, which go through the predictor's unfolded first layer. (The rest of the predictor is left out.)
"""

import time
from typing import Any

from benchmarks.common import HEAD_WIDTH, Job, talks


def measure(job: Job) -> dict[str, float]:
    """Seconds for the job's images, once the model is loaded."""
    import torch
    from transformers import AutoModelForImageTextToText

    from m3agiqa.engine.prompting import load_processor

    processor = load_processor(job.folder(), job.config().model)
    builder = job.builder()
    loaded: Any = AutoModelForImageTextToText.from_pretrained(job.folder(), dtype=getattr(torch, job.dtype))
    model = loaded.eval()
    layer = torch.nn.Linear(model.get_output_embeddings().weight.shape[0], HEAD_WIDTH, dtype=model.dtype)
    words = [ids[0] for ids in builder.rating_ids]
    held = talks(job.corpus())
    started = time.perf_counter()
    with torch.inference_mode():
        for talk in held:
            ids, pixels = _encode(processor, builder, talk, model.dtype)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | pixels
            out = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=job.tokens,
                eos_token_id=list(builder.stop_ids),
                pad_token_id=builder.stop_ids[0],
                suppress_tokens=sorted(builder.control_ids - set(builder.stop_ids)),
            )
            description, _ = builder.split_end(out[0, ids.shape[1] :].tolist())
            more = description + builder.second_round(talk.questions)
            whole = torch.cat([ids, torch.tensor([more])], dim=1)
            logits = model(input_ids=whole, attention_mask=torch.ones_like(whole), **pixels).logits
            logits[0, -1, words].softmax(-1)
            layer(logits)
    return {"images": job.images, "seconds": time.perf_counter() - started}


def _encode(processor: Any, builder: Any, talk: Any, dtype: Any) -> tuple[Any, dict[str, Any]]:
    import torch

    encoded = processor(
        text=[builder.image_token], images=[[talk.image]], add_special_tokens=False, return_tensors="pt"
    )
    ids = builder.first_round(talk.questions)
    at = ids.index(builder.image_token_id)
    ids[at : at + 1] = encoded["input_ids"][0].tolist()
    skipped = ("input_ids", "attention_mask", "mm_token_type_ids")
    pixels = {key: value for key, value in encoded.items() if key not in skipped}
    return torch.tensor([ids]), {k: v.to(dtype) if v.is_floating_point() else v for k, v in pixels.items()}
