"""The check that running blocks one by one computes what the model computes."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compress.blockwise.calls import FIX, NOT_RUN
from compress.blockwise.executor import BlockExecutor
from compress.blockwise.linears import TargetLinear, find_linears
from compress.blockwise.streamed import StopForward
from compress.errors import PassError
from compress.progress import Progress

#: Largest difference to allow, relative to the largest output.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class _Held:
    """Hidden states in memory, of the one sample that is checked."""

    states: torch.Tensor

    def read(self, rows: Sequence[int]) -> torch.Tensor:
        return self.states


def check_blockwise(
    executor: BlockExecutor, progress: Progress, wanted: Mapping[int, Collection[str]] | None = None
) -> None:
    """Learn how blocks are called, then compare each block run by itself with the model run whole, on one sample.

    Args:
        wanted: names of tensors by block; each must be the weight of a layer that its block calls.

    Raises:
        PassError: naming the first block that differs, or a tensor that no layer is called with.
        CheckpointError: a block outputs NaN or infinite values.
    """
    executor.learn_calls()
    with progress.task("checking blocks", 2 * executor.depth, "blocks") as task:
        outputs = _outputs(executor)
        task.advance(executor.depth)
        alone = executor.beside()  # lists end in the hidden states of one sample
        with torch.no_grad():
            for index in range(executor.depth):
                executor.check_finite(index, outputs[index])
                if executor.is_first(index):
                    for place, one in enumerate(executor.streamed.lists[: executor.streamed.list_of(index)]):
                        alone.calls.end(place, _Held(outputs[one.end - 1]))
                    hidden = alone.first_hidden([0], index)
                hidden = _alone(alone, index, hidden, (wanted or {}).get(index, ()))
                scale = float(outputs[index].abs().max())
                difference = float((hidden - outputs[index]).abs().max())
                if not difference <= _TOLERANCE * max(scale, 1e-6):
                    raise _refusal(executor, index, f"run by itself differs by {difference:.3g}")
                task.advance()


def blocks_left_out(executor: BlockExecutor) -> set[int]:
    """Numbers of the blocks that the model does not run on the first sample."""
    seen: set[int] = set()

    def whole(index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen.add(index)
        with executor.streamed.block(index) as module:
            return module(hidden, *args, **kwargs)

    executor.streamed.run(executor.inputs.rows([0]), whole)
    return {*range(executor.depth)} - seen


def _refusal(executor: BlockExecutor, index: int, reason: str) -> PassError:
    title = executor.streamed.title_of(index)
    return PassError(f"this model cannot run block by block: {title} {reason}", fix=FIX)


def _outputs(executor: BlockExecutor) -> dict[int, torch.Tensor]:
    """The output of every block in a run of the whole model on the first sample, by number of the block."""
    outputs: dict[int, torch.Tensor] = {}

    def whole(index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with executor.streamed.block(index) as module:
            output = module(hidden, *args, **kwargs)
        states = output[0] if isinstance(output, (tuple, list)) else output
        outputs[index] = executor.calls.samples_first(index, states)
        if len(outputs) == len(due):
            raise StopForward
        return output

    due = [index for index in range(executor.depth) if not executor.calls.is_left_out(index)]
    executor.streamed.run(executor.inputs.rows([0]), whole)
    if absent := [index for index in due if index not in outputs]:
        raise _refusal(executor, absent[0], NOT_RUN)
    for index in range(executor.depth):  # a list's first block is run
        if index not in outputs:
            outputs[index] = outputs[index - 1]
    return outputs


def _alone(executor: BlockExecutor, index: int, hidden: torch.Tensor, wanted: Collection[str]) -> torch.Tensor:
    """The output of a block run by itself on the first sample."""
    with executor.streamed.block(index) as module:
        linears, _ = find_linears(executor.streamed, index, module, wanted)
        called: set[str] = set()
        handles = [
            linear.module.register_forward_pre_hook(lambda m, a, name=linear.name: called.add(name))
            for linear in linears
        ]
        try:
            call = executor.calls.of(index, [0])
            before = list(_sizes(call))
            output = executor.forward(index, module, [0], hidden)
            if list(_sizes(call)) != before:
                raise _refusal(executor, index, "writes into what later blocks read")
        except PassError:
            raise
        except Exception as error:  # whatever a block lacks when it is run by itself
            raise PassError(
                f"this model cannot run block by block: {executor.streamed.title_of(index)} run by itself fails ({error!r})",
                fix=FIX,
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        unread = [linear for linear in linears if linear.owner is None and linear.name not in called]
        _check_called(executor, unread, lambda: executor.forward(index, module, [0], hidden))
    return output


def _check_called(executor: BlockExecutor, unread: Sequence[TargetLinear], run: Callable[[], torch.Tensor]) -> None:
    """Raise `PassError` where a block computes with a matrix without calling its layer.

    A matrix that the block does not use on these data is treated by its weights alone, as an expert without tokens.
    """
    if not unread:
        return
    weights = [linear.module.weight for linear in unread]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            output = run()
            grads = torch.autograd.grad(output.sum(), weights, allow_unused=True) if output.requires_grad else ()  # type: ignore[arg-type]
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    if name := next((s.name for s, grad in zip(unread, grads, strict=False) if grad is not None), None):
        module = re.sub(r"\.\d+(?=\.)", ".*", name.rpartition(".")[0])
        raise PassError(
            f"{name} is used by its block without a call of its layer, so that its inputs cannot be measured",
            key="skip",
            fix=f"skip it: skip: [{module}], or use a method that needs no calibration",
        )


def _sizes(value: Any) -> Iterator[int]:
    """Lengths of the lists and dicts in a call, nested ones too."""
    if isinstance(value, (tuple, list, dict)):
        yield len(value)
        for one in value.values() if isinstance(value, dict) else value:
            yield from _sizes(one)
