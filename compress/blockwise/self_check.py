"""The check that running blocks one by one computes what the model computes."""

from __future__ import annotations

from typing import Any

import torch

from compress.blockwise.executor import BlockExecutor
from compress.errors import PassError
from compress.progress import Progress

#: Largest difference to allow, relative to the largest output.
_TOLERANCE = 1e-4


def check_blockwise(executor: BlockExecutor, progress: Progress) -> None:
    """Learn how blocks are called, then compare each block run by itself with the model run whole, on one sample.

    Raises:
        PassError: naming the first block that differs. CheckpointError: a block outputs NaN or infinite values.
    """
    executor.learn_calls()
    rows = [0]
    hidden = executor.first_hidden(rows)
    outputs: list[torch.Tensor] = []

    def whole(index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with executor.streamed.block(index) as module:
            output = module(hidden, *args, **kwargs)
        outputs.append(output[0] if isinstance(output, tuple) else output)
        return output

    with progress.task("checking blocks", 2 * executor.depth, "blocks") as task:
        executor.streamed.run(executor.inputs.rows(rows), whole)
        task.advance(executor.depth)
        with torch.no_grad():
            for index in range(executor.depth):
                executor.check_finite(index, outputs[index])
                hidden = _alone(executor, index, rows, hidden)
                scale = float(outputs[index].abs().max())
                difference = float((hidden - outputs[index]).abs().max())
                if not difference <= _TOLERANCE * max(scale, 1e-6):
                    raise PassError(
                        f"this model cannot run block by block: block {index} run by itself differs by {difference:.3g}",
                        fix="use a method that needs no calibration",
                    )
                task.advance()


def _alone(executor: BlockExecutor, index: int, rows: list[int], hidden: torch.Tensor) -> torch.Tensor:
    with executor.streamed.block(index) as module:
        try:
            return executor.forward(index, module, rows, hidden)
        except Exception as error:  # whatever a block lacks when it is run by itself
            raise PassError(
                f"this model cannot run block by block: block {index} run by itself fails ({error!r})",
                fix="use a method that needs no calibration",
            ) from error
