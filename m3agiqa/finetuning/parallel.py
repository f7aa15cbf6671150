"""A learner over several processes: with the whole model in each (DDP), or its layers spread over them (FSDP)."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from m3agiqa.finetuning.encoding import Batch
from m3agiqa.finetuning.learner import Learner, Outcome


class Parallel:
    """Calls a learner, alone or together with the other processes.

    Args:
        learner: on its device, with the same weights in all processes. All make the same calls from now on.
        spread: FSDP rather than DDP; alone, neither is needed.
    """

    def __init__(self, learner: Learner, size: int, *, spread: bool) -> None:
        self._module: Any = learner
        self._spread, self._whole = spread and size > 1, not spread and size > 1
        device = next(learner.parameters()).device
        if self._spread:
            _shard(learner, size, device)
        elif self._whole:
            ids = [device.index] if device.type == "cuda" else None
            self._module = DistributedDataParallel(learner, device_ids=ids, broadcast_buffers=False)

    def __call__(self, batch: Batch) -> Outcome:
        """What a batch comes to."""
        return Outcome(*self._module(batch))

    @contextlib.contextmanager
    def step_part(self, *, last: bool) -> Iterator[None]:
        """Forward and backward of a part of a step; gradients are exchanged in the last only."""
        if self._whole and not last:
            with self._module.no_sync():
                yield
            return
        if self._spread:
            self._module.set_requires_gradient_sync(last)
        yield


def _shard(learner: Learner, size: int, device: torch.device) -> None:
    """Spreads the layers of the language model one by one, and all the rest together."""
    mesh = init_device_mesh(device.type, (size,))
    decoder: nn.Module = learner.model.get_decoder()
    for layers in (m for m in decoder.children() if isinstance(m, nn.ModuleList)):
        for layer in layers:
            fully_shard(layer, mesh=mesh)
    fully_shard(learner, mesh=mesh)


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor, whole, on the CPU. Where it is spread all processes must ask."""
    whole = tensor.detach()
    if isinstance(whole, DTensor):
        whole = whole.full_tensor()
    return whole.cpu().clone().contiguous()


def spread_as(like: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A whole tensor, placed as another one is."""
    value = value.to(like.device, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value


def add_up(values: torch.Tensor) -> torch.Tensor:
    """Sums of some numbers over all processes."""
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(values)
    return values
