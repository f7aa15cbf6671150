"""e, the limit: the same prompts handed straight to the bare vLLM engine in memory. Text only, no Ray, no capture.

b, two-engines, begins with the same and then reads each whole conversation once more, in a second engine
that pools: vLLM's own way to hidden states (`token_embed`).
"""

import time
from typing import Any

from benchmarks.common import Job, Talk, sampling, talks, vllm_args, vllm_environment, vllm_prompts
from m3agiqa.engine.prompting import PromptBuilder


def measure(job: Job) -> dict[str, float]:
    """Seconds for the job's images, once the engine is up."""
    vllm_environment()
    from vllm import LLM

    builder, held = job.builder(), talks(job.corpus())
    llm = LLM(str(job.folder()), **vllm_args(job))
    started = time.perf_counter()
    converse(llm, builder, held, job)
    return {"images": job.images, "seconds": time.perf_counter() - started}


def measure_two_engines(job: Job) -> dict[str, float]:
    """The same for system b."""
    vllm_environment()
    from vllm import LLM

    builder, held = job.builder(), talks(job.corpus())
    llm = LLM(str(job.folder()), **vllm_args(job))
    # Not normalised: the last hidden states as they are.
    pooling: Any = {"task": "token_embed", "use_activation": False}
    pooler = LLM(str(job.folder()), runner="pooling", convert="embed", pooler_config=pooling, **vllm_args(job))
    started = time.perf_counter()
    read = vllm_prompts(converse(llm, builder, held, job), held)
    states = pooler.encode(read, pooling_task="token_embed", use_tqdm=False)
    seconds = time.perf_counter() - started
    assert len(states) == len(held)
    return {"images": job.images, "seconds": seconds}


def converse(llm: Any, builder: PromptBuilder, held: list[Talk], job: Job) -> list[list[int]]:
    """Both rounds of all conversations; returns the prompts of round 2."""
    from vllm import SamplingParams

    def ask(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        params = SamplingParams(**sampling(builder, tokens))
        done = llm.generate(vllm_prompts(prompts, held), params, use_tqdm=False)
        return [builder.split_end(output.outputs[0].token_ids)[0] for output in done]

    first = [builder.first_round(talk.questions) for talk in held]
    described = ask(first, job.tokens)
    second = [
        prompt + description + builder.second_round(talk.questions)
        for prompt, description, talk in zip(first, described, held, strict=True)
    ]
    ask(second, job.config().scoring.max_rating_tokens)
    return second
