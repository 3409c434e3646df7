"""The processes of one run (torchrun): who does which part, and the sums and values that they exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """This process, number ``rank`` of ``world``. With one process every method returns its arguments unchanged."""

    rank: int = 0
    world: int = 1

    def shard(self, items: Sequence[T]) -> list[T]:
        """This process's items: every ``world``-th one, starting at ``rank``."""
        return list(items[self.rank :: self.world])

    def all_reduce(self, *tensors: torch.Tensor) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.world > 1:
            import torch.distributed as dist

            for tensor in tensors:
                dist.all_reduce(tensor)

    def reduce_sum(self, *values: float) -> list[float]:
        """Sums over all processes."""
        if self.world == 1:
            return list(values)
        import torch

        tensor = torch.tensor(values, dtype=torch.float64)
        self.all_reduce(tensor)
        return [float(v) for v in tensor]

    def broadcast(self, source: int, *tensors: torch.Tensor) -> None:
        """Overwrite each tensor with that of process ``source``. Bool tensors are sent as bytes."""
        if self.world > 1:
            import torch
            import torch.distributed as dist

            for tensor in tensors:
                dist.broadcast(tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor, source)

    def broadcast_object(self, source: int, value: Any) -> Any:
        """The value of process ``source``."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, source)
        return box[0]

    def barrier(self) -> None:
        """Wait until all processes have arrived."""
        if self.world > 1:
            import torch.distributed as dist

            dist.barrier()
