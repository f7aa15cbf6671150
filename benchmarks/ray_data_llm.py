"""c, ray-data-llm: Ray's own batch inference, `ray.data.llm`. It asks one question a row, so that two rounds are
two chained processors with an engine each. Rating words only: it gives no hidden states.
"""

import csv
import io
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import Job, sampling, vllm_args, vllm_environment
from m3agiqa import conversation
from m3agiqa.aspects import Aspect

# As many as our own pipeline keeps in its engine: 8 batches of 16 images with 3 aspects.
_BATCH, _BATCHES = 48, 8


def measure(job: Job) -> dict[str, float]:
    """Seconds for the job's images, from the first request's start to the last row in parquet.

    Both engines load at once, before that, and as they cost the same they are up at about the same time.
    """
    vllm_environment()
    import pyarrow.parquet as pq
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    first, second = _processors(job)
    rows = ray.data.from_items(_rows(job), override_num_blocks=max(1, job.images * 3 // _BATCH))
    with tempfile.TemporaryDirectory() as out:
        second(first(rows)).write_parquet(out)
        ended = time.time()
        done = pq.read_table(out)
    ray.shutdown()
    assert done.num_rows == 3 * job.images, done.num_rows
    began = min(at - took for at, took in zip(*done.select(["_at", "_took"]).to_pydict().values(), strict=True))
    return {"images": job.images, "seconds": ended - began}


def _rows(job: Job) -> list[dict[str, Any]]:
    """A row for each conversation: the image's bytes, the aspect, the prompt."""
    path = Path(job.manifest)
    with path.open(newline="") as file:
        listed = list(csv.DictReader(file))[: job.images]
    return [
        {"bytes": (path.parent / row["image_path"]).read_bytes(), "aspect": str(aspect), "text": row["prompt"]}
        for row in listed
        for aspect in Aspect
    ]


def _processors(job: Job) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    from PIL import Image
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    builder = job.builder()
    config = vLLMEngineProcessorConfig(
        model_source=str(job.folder()),
        engine_kwargs=vllm_args(job) | {"distributed_executor_backend": "mp"},
        batch_size=_BATCH,
        max_concurrent_batches=_BATCHES,
        concurrency=1,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        prepare_multimodal_stage=False,
        placement_group_config={"bundles": [{"CPU": 1}]},
        log_engine_metrics=False,
    )

    def request(row: dict[str, Any], ids: list[int], tokens: int) -> dict[str, Any]:
        image = Image.open(io.BytesIO(row["bytes"])).convert("RGB")
        params = sampling(builder, tokens)
        # A table's mapping has names of text, which vLLM refuses here; control tokens are taken out below.
        del params["logit_bias"]
        return row | {"tokenized_prompt": ids, "multimodal_data": {"image": image}, "sampling_params": params}

    def ask_first(row: dict[str, Any]) -> dict[str, Any]:
        ids = builder.first_round(conversation.questions(Aspect(row["aspect"]), row["text"]))
        return request(row, ids, job.tokens)

    def keep_first(row: dict[str, Any]) -> dict[str, Any]:
        kept = {key: row[key] for key in ("bytes", "aspect", "text")}
        described, _ = builder.split_end([int(token) for token in row["generated_tokens"]])
        described = [token for token in described if token not in builder.control_ids]
        return kept | {"described": described, "_at": time.time(), "_took": float(row["time_taken_llm"])}

    def ask_second(row: dict[str, Any]) -> dict[str, Any]:
        questions = conversation.questions(Aspect(row["aspect"]), row["text"])
        described = [int(token) for token in row["described"]]
        ids = builder.first_round(questions) + described + builder.second_round(questions)
        return request(row, ids, job.config().scoring.max_rating_tokens)

    def keep_second(row: dict[str, Any]) -> dict[str, Any]:
        rated, _ = builder.split_end([int(token) for token in row["generated_tokens"]])
        kept = {key: row[key] for key in ("aspect", "text", "_at", "_took")}
        return kept | {"rating": conversation.parse_rating(builder.decode(rated))}

    first = build_processor(config, preprocess=ask_first, postprocess=keep_first)
    second = build_processor(config, preprocess=ask_second, postprocess=keep_second)
    return first, second
