"""The processes that train one head together. Alone, there is nothing to do."""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import distributed


class Group(Protocol):
    """What a training step needs to know of the others."""

    rank: int
    size: int

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """values [n] of every process, by rank: [size * n]. No gradient passes."""

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replaces each tensor by its sum over the processes."""

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of every process, by rank."""


class Alone:
    """One process."""

    rank, size = 0, 1

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """The values themselves."""
        return values

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Nothing to add."""

    def gather_objects(self, value: Any) -> list[Any]:
        """The one value."""
        return [value]


class Processes:
    """The default process group of torch.distributed, which must be set up (gloo or nccl)."""

    def __init__(self) -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """values [n] of every process, by rank: [size * n]. No gradient passes."""
        found = [torch.empty_like(values) for _ in range(self.size)]
        distributed.all_gather(found, values.contiguous())
        return torch.cat(found)

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replaces each tensor by its sum over the processes, all in one exchange."""
        tensors = list(tensors)
        flat = torch.cat([one.reshape(-1) for one in tensors])
        distributed.all_reduce(flat)
        for one, summed in zip(tensors, flat.split([one.numel() for one in tensors]), strict=True):
            one.copy_(summed.view_as(one))

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of every process, by rank."""
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value)
        return found
