"""Attention of image encoders on a CPU: equal to torch's, for every shape that encoders ask for, and in use on AMD."""

import importlib.util
import itertools
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]

# Lengths of sequences: shorter than a block, one block, a whole number of them, and others.
LENGTHS = (5, 32, 96, 1, 577, 130)


def expected(q: Any, k: Any, v: Any, starts: list[int], scale: float) -> torch.Tensor:
    """torch's attention in double precision, a sequence at a time."""
    parts = []
    for first, last in itertools.pairwise(starts):
        one = [x[first:last].transpose(0, 1)[None].double() for x in (q, k, v)]
        parts.append(scaled_dot_product_attention(*one, scale=scale, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize(
    ("heads", "key_heads", "size"),
    [(6, 6, 64), (2, 2, 32), (3, 3, 72), (8, 2, 64), (2, 2, 80), (2, 2, 16), (1, 1, 256)],
)
def test_equal_to_torch(dtype: torch.dtype, tolerance: float, heads: int, key_heads: int, size: int):
    from m3agiqa.engine.vllm_cpu_vision import attend

    torch.manual_seed(0)
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)
    q = torch.randn(int(starts[-1]), heads, size).to(dtype)
    k, v = (torch.randn(int(starts[-1]), key_heads, size).to(dtype) for _ in range(2))
    found = attend(q, k, v, starts.to(torch.int32), 0.2)
    wanted = expected(q, k, v, starts.tolist(), 0.2)
    assert found.shape == q.shape
    assert found.dtype == dtype
    assert (found.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


def worker(pipe: Any) -> None:
    """As a worker of an engine: loads the plugin, and tells which attention vLLM makes and how far it is off."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention

    from m3agiqa.engine.vllm_plugins import register

    register()
    register()
    torch.manual_seed(0)
    # Queries, keys and values are views of one product, as in vLLM's encoders.
    joined = torch.randn(3, 50, 3 * 2 * 32)
    with set_current_vllm_config(VllmConfig()):
        made = MMEncoderAttention(2, 32, 32**-0.5)
        found = made(*joined.chunk(3, dim=-1))
    q, k, v = (x.reshape(150, 2, 32) for x in joined.chunk(3, dim=-1))
    far = (found.reshape(150, 2, 32) - expected(q, k, v, [0, 50, 100, 150], 32**-0.5)).abs().max().item()
    pipe.send((type(made).__name__, tuple(found.shape), far))


def test_in_use_in_workers_on_amd():
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=worker, args=(theirs,), name="VllmWorker-0", daemon=True)
    process.start()
    assert ours.poll(120)
    name, shape, far = ours.recv()
    process.join(60)
    about = Path("/proc/cpuinfo").read_text()
    pays = "AuthenticAMD" in about and "avx512f" in about and importlib.util.find_spec("zentorch") is None
    assert name == ("CpuVisionAttention" if pays else "MMEncoderAttention")
    assert shape == (3, 50, 64)
    assert far < 2e-6
