"""`python -m benchmarks.head`: the predictor's xLSTM blocks of the `xlstm` package against ours, as one JSON line.

Both have the published size and the same weights. Repetitions are interleaved and medians are compared, as
machines are noisy; the first run of each is not counted.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from m3agiqa.predictor.head import HeadConfig, xlstm_stack

LENGTH = 512


def package_stack(length: int) -> nn.Module:
    """The published blocks, as the package has them for a machine without a CUDA compiler."""
    import xlstm

    stack: nn.Module = xlstm.xLSTMBlockStack(
        xlstm.xLSTMBlockStackConfig(
            mlstm_block=xlstm.mLSTMBlockConfig(
                mlstm=xlstm.mLSTMLayerConfig(conv1d_kernel_size=4, qkv_proj_blocksize=4, num_heads=4)
            ),
            slstm_block=xlstm.sLSTMBlockConfig(
                slstm=xlstm.sLSTMLayerConfig(backend="vanilla", num_heads=4, conv1d_kernel_size=4),
                feedforward=xlstm.FeedForwardConfig(proj_factor=1.3, act_fn="gelu"),
            ),
            context_length=length,
            num_blocks=4,
            embedding_dim=512,
            slstm_at=[1],
        )
    )
    return stack


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    theirs = package_stack(LENGTH)
    # What starts at zero would hide errors.
    for name, parameter in theirs.named_parameters():
        if "_recurrent_kernel_" in name or ("mlstm_cell" in name and "gate.weight" in name):
            nn.init.normal_(parameter, std=0.05)
    ours = xlstm_stack(HeadConfig(input_width=512))
    ours.load_state_dict(theirs.state_dict())
    stacks = {"package": theirs.to(args.device), "ours": ours.to(args.device)}
    found: dict[str, Any] = {"length": LENGTH, "device": args.device, "threads": torch.get_num_threads()}
    for batch in (8, 32):
        found[f"forward_{batch}"] = compare(stacks, batch, args.repeats, forward)
    found["forward_backward_4"] = compare(stacks, 4, args.repeats, forward_backward)
    print(json.dumps(found))


def forward(stack: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """One pass without gradients; returns the output."""
    with torch.inference_mode():
        result: torch.Tensor = stack(x)
    return result


def forward_backward(stack: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """One pass and its gradients; returns that of the input."""
    stack.zero_grad()
    x = x.clone().requires_grad_()
    stack(x).square().mean().backward()
    assert x.grad is not None
    return x.grad * x.numel()


def compare(
    stacks: dict[str, nn.Module], batch: int, repeats: int, run: Callable[[nn.Module, torch.Tensor], torch.Tensor]
) -> dict[str, float]:
    """Median seconds of both, their ratio, and the largest difference of what they return."""
    x = torch.randn(batch, LENGTH, 512, generator=torch.Generator().manual_seed(batch))
    x = x.to(next(stacks["ours"].parameters()).device)
    seconds: dict[str, list[float]] = {name: [] for name in stacks}
    for _ in range(repeats + 1):
        results = []
        for name, stack in stacks.items():
            started = time.perf_counter()
            # To the CPU, which waits for a GPU.
            results.append(run(stack, x).cpu())
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    difference = float((results[0] - results[1]).abs().max())
    return {**medians, "ratio": medians["package"] / medians["ours"], "difference": difference}


if __name__ == "__main__":
    main()
