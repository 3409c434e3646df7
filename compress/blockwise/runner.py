"""Block by block over a checkpoint, with calibration activations, in the memory of one block.

    embed ▶ for each block: load ▶ statistics of its inputs ▶ change ▶ rerun ▶ write ▶ drop

Two streams of activations go along: what the blocks as changed so far give (the inputs of the next block), and, where a
change is tuned towards the original, what the original blocks give. Both lie in files, each twice: a block reads one and
writes the other, so that a kill at any moment leaves what the block started from. A sweep that is started again in the same
folder goes on after the last finished block and ends with the same bytes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compress.architectures.model_map import model_map
from compress.blockwise.activations import Activations
from compress.blockwise.linears import (
    Experts,
    InputStatistics,
    StopForward,
    TargetLinear,
    collect_hessians,
    find_linears,
    group_linears,
    set_token_mask,
    unfused,
)
from compress.blockwise.memory_budget import ALLOCATOR_RETAIN, FLOAT64_MAX_WIDTH, STATISTICS_BYTES, TOKENS_PER_BATCH
from compress.blockwise.shared import SharedTensors, file_of
from compress.blockwise.streamed import StreamedModel
from compress.checkpoint.codecs import canonical, pack_bits
from compress.checkpoint.decode import unpack_bits
from compress.checkpoint.open import Checkpoint, Codes, Value, torch_dtype
from compress.distributed import ProcessGroup
from compress.errors import CheckpointError, PassError
from compress.memory import keep_freed
from compress.progress import Progress, SilentProgress
from compress.spec.spec import widest


@dataclass(frozen=True)
class Inputs:
    """Calibration samples: the model's inputs by name, each with samples first, and which tokens count [samples, length]."""

    values: Mapping[str, torch.Tensor]
    mask: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens that count."""
        return next(iter(self.values.values())).numel() if self.mask is None else int(self.mask.sum())

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(next(iter(self.values.values())))

    def rows(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Inputs of those samples; padding is masked."""
        picked = {name: value[list(rows)] for name, value in self.values.items()}
        return picked if self.mask is None else {**picked, "attention_mask": self.mask[list(rows)].long()}


@dataclass(frozen=True)
class Teacher:
    """What blocks are tuned towards where that is not the checkpoint being changed.

    Attributes:
        checkpoint: the original. spans: how many of its blocks stand for that many of the changed one: block i stands for
            those from ``spans[i - 1]`` (0 for the first) up to ``spans[i]``.
        channels: which of its hidden channels the changed one has; None for all.
    """

    checkpoint: Checkpoint
    spans: Sequence[int]
    channels: torch.Tensor | None = None

    def blocks(self, index: int) -> range:
        """Numbers of the original's blocks that block ``index`` stands for."""
        return range(self.spans[index - 1] if index else 0, self.spans[index])

    def view(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of the original's hidden states those that the changed one has."""
        return hidden if self.channels is None else hidden[..., self.channels]


@dataclass
class Block:
    """A loaded block at work.

    Attributes:
        index: its number. module: with weights. sites: its wanted matrices. groups: those that read the same inputs.
        inputs: hidden states as the blocks before, changed, give them. originals: as the original ones do; and targets: what
            the original block makes of those. Both None in a sweep without targets.
        last: the group that reads last in a pass, if it is always the same. details: what the report will say of it.
        frozen: ids of parameters that other blocks share, which are solved for and then stay.
        reached: by expert, as the checkpoint calls it, how many tokens it read where that was counted.
    """

    runner: BlockRunner
    index: int
    module: Any
    linears: list[TargetLinear]
    groups: list[list[TargetLinear]]
    swaps: list[tuple[Any, str, Experts]]
    inputs: Activations
    originals: Activations | None
    targets: Activations | None
    last: int | None = None
    details: dict[str, Any] = field(default_factory=dict)
    frozen: set[int] = field(default_factory=set)
    reached: dict[str, int] = field(default_factory=dict)

    def forward(self, rows: Sequence[int], hidden: torch.Tensor) -> torch.Tensor:
        """Outputs of the block as it is now, for those samples and hidden states [len(rows), …]."""
        return self.runner.through(self.index, self.module, rows, hidden)

    def earlier_mask(self, linear: TargetLinear) -> torch.Tensor | None:
        """The keep-mask that a site's tensor came with, as the site shapes it; read only where there is one."""
        if self.runner.checkpoint.spec.tensors[linear.name].kept is None:
            return None
        mask = self.runner.checkpoint.tensor(linear.name).mask
        assert mask is not None
        return (mask.T if linear.transposed else mask).to(linear.weight.device)

    def reading(self, names: Collection[str]) -> list[list[TargetLinear]]:
        """The groups that hold one of these tensors."""
        return [group for group in self.groups if any(linear.name in names for linear in group)]

    def statistics(
        self, budget: int = STATISTICS_BYTES, groups: Sequence[list[TargetLinear]] | None = None
    ) -> Iterator[tuple[list[TargetLinear], InputStatistics, bool]]:
        """Each group with H = Σ x xᵀ of its inputs, and whether the block may be changed: no further pass through it follows.

        As many groups (all, or those given) at a time as fit ``budget`` bytes, at least one; each such part takes a pass over
        the samples.
        """
        pending = list(self.groups if groups is None else groups)
        end = None if self.last is None else self.groups[self.last]
        while pending:
            part, used = [pending.pop(0)], 0
            used = _hessian_bytes(part[0])
            while pending and used + _hessian_bytes(pending[0]) <= budget:
                part.append(pending.pop(0))
                used += _hessian_bytes(part[-1])
            last = next((i for i, group in enumerate(part) if group is end), None)
            with (
                torch.no_grad(),
                unfused(self.swaps),
                collect_hessians(part, summing_dtype, self.runner.device, last) as found,
            ):
                for rows in self.runner.batches():
                    set_token_mask(part, self.swaps, self.runner.mask(rows))
                    with suppress(StopForward):
                        self.forward(rows, self.inputs.read(rows).to(self.runner.device))
                set_token_mask(part, self.swaps, None)
            for group in part:
                statistics = found.pop(0)
                self.runner.processes.all_reduce(statistics.hessian)
                self.runner.processes.all_reduce(statistics.total)
                statistics.tokens = int(self.runner.processes.reduce_sum(statistics.tokens)[0])
                self.count(group, statistics.tokens)
                self.runner.shared_tensors.add(group, statistics)
                yield group, statistics, not pending

    def count(self, linears: Sequence[TargetLinear], tokens: int) -> None:
        """Note that so many tokens reached the experts that sites belong to."""
        names = {linear.name.rpartition(".")[0].rpartition(".")[0] for linear in linears if linear.owner is not None}
        self.reached |= dict.fromkeys(names, tokens)

    def experts(self) -> dict[str, Any] | None:
        """For the report, tokens read in all and by expert; None where no expert was counted."""
        if not self.reached:
            return None
        order = sorted(self.reached, key=lambda name: (len(name), name))  # 2 before 10
        return {"tokens": self.runner.inputs.tokens, "reached": {name: self.reached[name] for name in order}}


def summing_dtype(width: int) -> torch.dtype:
    """In which statistics of so many inputs are summed."""
    return torch.float64 if width <= FLOAT64_MAX_WIDTH else torch.float32


def _hessian_bytes(group: Sequence[TargetLinear]) -> int:
    width = int(group[0].weight.shape[1])
    return width * width * (8 if width <= FLOAT64_MAX_WIDTH else 4)


@dataclass(frozen=True)
class TensorExtras:
    """What a tensor has beside its values: a keep-mask, as the checkpoint shapes it; codes; factors [O, r] and [r, I]."""

    mask: torch.Tensor | None = None
    codes: Codes | None = None
    factors: tuple[torch.Tensor, torch.Tensor] | None = None


#: What a sweep does to a block: change the weights in the module, and return what some tensors have beside them.
BlockFn = Callable[[Block], dict[str, TensorExtras]]


class BlockRunner:
    """A sweep over the blocks of a checkpoint. See `run`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        inputs: Inputs,
        wanted: set[str],
        *,
        work: Path,
        dtype: str,
        device: str,
        progress: Progress,
        with_targets: bool,
        seed: int = 0,
        processes: ProcessGroup | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.checkpoint, self.inputs, self.wanted = checkpoint, inputs, wanted
        self.work, self.device, self.progress = work, device, progress
        self.with_targets, self.seed, self.processes = with_targets, seed, processes or ProcessGroup()
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.streamed = StreamedModel(checkpoint, dtype=self.dtype, device=device)
        self.depth = len(self.streamed.blocks)
        self.teacher = teacher
        self._original: BlockRunner | None = None
        if teacher is not None:
            quiet = SilentProgress()
            self._original = BlockRunner(
                teacher.checkpoint,
                inputs,
                set(),
                work=work,
                dtype=dtype,
                device=device,
                progress=quiet,
                with_targets=False,
                seed=seed,
                processes=processes,
            )
        self._calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._tuple = False
        self._fixed = False
        outside = [n for n in wanted if self.streamed.record.block_index(n) is None]
        if outside:
            raise PassError(
                f"{sorted(outside)[0]} is outside the blocks, where calibrated methods do not reach",
                key="only",
                fix="use method: magnitude for it",
            )
        self.shared_tensors = SharedTensors(self)

    # ---- running ----

    def batches(self, first: int | None = None) -> Iterator[list[int]]:
        """Numbers of this process's samples, a batch at a time; of the first so many if that is given."""
        length = next(iter(self.inputs.values.values())).shape[1:].numel()
        size = max(1, TOKENS_PER_BATCH["cpu" if self.device == "cpu" else "cuda"] // max(1, length))
        mine = self.processes.shard(range(self.inputs.samples)[:first])
        for start in range(0, len(mine), size):
            yield mine[start : start + size]

    def mask(self, rows: Sequence[int]) -> torch.Tensor | None:
        """Which tokens of those samples count."""
        return None if self.inputs.mask is None else self.inputs.mask[list(rows)].to(self.device)

    def calls(self, rows: Sequence[int]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Arguments beside the hidden states of each block; the same for all samples where nothing is masked."""
        if self._fixed and len(rows) in self._calls:
            return self._calls[len(rows)]
        _, calls = self._capture(rows)
        if self._fixed:
            self._calls[len(rows)] = calls
        return calls

    def _capture(self, rows: Sequence[int]) -> tuple[torch.Tensor, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
        """First hidden states, and each block's arguments, by running the model with blocks that pass on what they get."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        first: list[torch.Tensor] = []
        last: list[torch.Tensor] = []

        def stub(index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if index == 0:
                first.append(hidden)
            elif index != len(calls) or hidden is not last[0]:
                raise _Unfollowable(index)
            calls.append((args, {k: _without_cache(v) for k, v in kwargs.items()}))
            last[:] = [hidden]
            return (hidden,) if self._tuple else hidden

        self.streamed.run(self.inputs.rows(rows), stub)
        if len(calls) != self.depth:
            raise _Unfollowable(len(calls))
        return first[0], calls

    def first_hidden(self, rows: Sequence[int]) -> torch.Tensor:
        """What the first block reads of those samples."""
        return self._capture(rows)[0]

    def through(self, index: int, module: Any, rows: Sequence[int], hidden: torch.Tensor) -> torch.Tensor:
        """Outputs of a loaded block for those samples and hidden states [len(rows), …]."""
        args, kwargs = self.calls(rows)[index]
        output = module(hidden, *args, **kwargs)
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def predict(self, rows: Sequence[int], hidden: torch.Tensor, extra: Mapping[str, Any]) -> torch.Tensor:
        """What the model predicts of those samples where the last block gives ``hidden``; with the head loaded."""

        def stub(index: int, before: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            after = hidden if index == self.depth - 1 else before
            return (after,) if self._tuple else after

        return self.streamed.predict(self.inputs.rows(rows), stub, extra)

    def _learn_calls(self) -> None:
        """How blocks are called: whether they return tuples, and whether their arguments depend on the sample."""
        problems = []
        for self._tuple in (False, True):
            try:
                _, calls = self._capture([0])
            except _Unfollowable as error:
                problems.append(error.index)
            except (TypeError, IndexError, ValueError, RuntimeError, AttributeError):
                problems.append(0)
            else:
                break
        else:
            raise PassError(
                f"the sweep cannot follow {type(self.streamed.model).__name__}: block {max(problems)} is not fed by the "
                "block before it alone",
                fix="use a method that needs no calibration",
            )
        other = self._capture([self.inputs.samples - 1])[1]
        self._fixed = self.inputs.mask is None and all(_equal(a, b) for a, b in zip(calls, other, strict=True))

    def check(self) -> None:
        """On one sample, blocks run one by one give what the model gives when run whole.

        Raises:
            PassError: naming the first block that differs.
        """
        self._learn_calls()
        rows = [0]
        first, _ = self._capture(rows)
        hidden, found = first, []
        outputs: list[torch.Tensor] = []

        def whole(index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with self.streamed.block(index) as module:
                output = module(hidden, *args, **kwargs)
            outputs.append(output[0] if isinstance(output, tuple) else output)
            return output

        with self.progress.task("checking the sweep", 2 * self.depth, "blocks") as task:
            self.streamed.run(self.inputs.rows(rows), whole)
            task.advance(self.depth)
            with torch.no_grad():
                for index in range(self.depth):
                    self._check_finite(index, outputs[index])
                    with self.streamed.block(index) as module:
                        try:
                            hidden = self.through(index, module, rows, hidden)
                        except Exception as error:  # whatever a block lacks when it is run by itself
                            raise PassError(
                                f"the sweep cannot follow this model: block {index} run by itself fails ({error!r})",
                                fix="use a method that needs no calibration",
                            ) from error
                    scale = float(outputs[index].abs().max())
                    difference = float((hidden - outputs[index]).abs().max())
                    found.append(difference)
                    if not difference <= 1e-4 * max(scale, 1e-6):
                        raise PassError(
                            f"the sweep does not follow this model: block {index} run by itself differs by {difference:.3g}",
                            fix="use a method that needs no calibration",
                        )
                    task.advance()

    # ---- the sweep ----

    def run(self, change: BlockFn, title: str, before: Callable[[], None] | None = None) -> RunnerResult:
        """Change every block in order. ``change`` alters weights in the block's module and returns keep-masks by tensor.

        ``before`` is called once it is known how blocks are called; a resumed sweep calls it again.
        """
        keep_freed(ALLOCATOR_RETAIN)
        state = self._state()
        if state is None:
            self.check()
        else:
            self._learn_calls()
        if self._original is not None:
            self._original._learn_calls()
        if before is not None:
            before()
        self.shared_tensors.collect()
        sources = {"inputs": self} | ({"targets": self._original or self} if self.with_targets else {})
        files = {}
        for name, source in sources.items():
            shape = tuple(source.first_hidden([0]).shape[1:])
            files[name] = [
                Activations(self.work / f"{name}{i}.act", self.inputs.samples, shape, self.dtype) for i in (0, 1)
            ]
        if state is None:
            for rows in self.batches():
                for name, source in sources.items():
                    files[name][0].write(rows, source.first_hidden(rows))
            for pair in files.values():
                pair[0].sync()
            state = {"next": 0, "details": []}
            self._save(state)
        else:
            self.processes.barrier()
        by_block: dict[int, set[str]] = {}
        for name in self.wanted:
            index = self.streamed.record.block_index(name)
            assert index is not None
            by_block.setdefault(index, set()).add(name)
        last = max(by_block)
        with self.progress.task(title, last + 1, "blocks") as task:
            task.advance(state["next"])
            for index in range(state["next"], last + 1):
                start = time.perf_counter()
                now, then = index % 2, (index + 1) % 2
                with self.streamed.block(index) as module:
                    details = self._block(index, module, by_block.get(index, set()), files, now, then, change, last)
                details["seconds"] = round(time.perf_counter() - start, 3)
                state["details"].append({"block": index, **details})
                state["next"] = index + 1
                self._save(state)
                task.advance(note=f"block {index}")
        for pair in files.values():
            for file in pair:
                file.close()
        return RunnerResult(self.work / "blocks", self.checkpoint, list(range(last + 1)), state["details"])

    def changed(self) -> RunnerResult:
        """What there is so far."""
        return RunnerResult(self.work / "blocks", self.checkpoint, list(range(self.depth)), [])

    def unchanged(self, last: int, wanted: Mapping[int, Collection[str]]) -> Iterator[Block]:
        """Each block up to ``last`` as it came, on the inputs that it then has, with the sites of those tensors."""
        shape = tuple(self.first_hidden([0]).shape[1:])
        pair = [Activations(self.work / f"unchanged{i}.act", self.inputs.samples, shape, self.dtype) for i in (0, 1)]
        for rows in self.batches():
            pair[0].write(rows, self.first_hidden(rows))
        self.processes.barrier()
        for index in range(last + 1):
            now, then = pair[index % 2], pair[(index + 1) % 2]
            with self.streamed.block(index) as module:
                linears, swaps = find_linears(self.streamed, index, module, wanted.get(index, ()))
                block = Block(self, index, module, linears, [], swaps, now, None, None)
                if linears:
                    self._group(block)
                yield block
                with torch.no_grad():
                    for rows in self.batches():
                        then.write(rows, block.forward(rows, now.read(rows).to(self.device)))
            self.processes.barrier()
        for file in pair:
            file.close()

    def _group(self, block: Block) -> None:
        """Find which sites read the same inputs."""
        probe = [0]
        with torch.no_grad(), unfused(block.swaps):
            block.groups, block.last = group_linears(
                block.linears, lambda: block.forward(probe, block.inputs.read(probe).to(self.device))
            )

    def _block(
        self,
        index: int,
        module: Any,
        wanted: set[str],
        files: Mapping[str, list[Activations]],
        now: int,
        then: int,
        change: BlockFn,
        last: int,
    ) -> dict[str, Any]:
        inputs = files["inputs"][now]
        linears, swaps = find_linears(self.streamed, index, module, wanted)
        block = Block(self, index, module, linears, [], swaps, inputs, None, None)
        if self.with_targets:
            self._advance_targets(block, files["targets"][now], files["targets"][then])
            self.processes.barrier()  # tuning reads samples of other processes too
            block.originals, block.targets = files["targets"][now], files["targets"][then]
        self.shared_tensors.renew(block)
        if linears:
            block.frozen = self.shared_tensors.frozen(block)
            self._group(block)
            if (split := self.shared_tensors.split(block.groups)) != block.groups:
                block.groups, block.last = split, None
            self._write(index, module, change(block))
            if (experts := block.experts()) is not None:
                block.details["experts"] = experts
        if index < last:
            with torch.no_grad():
                for rows in self.batches():
                    output = block.forward(rows, inputs.read(rows).to(self.device))
                    self._check_finite(index, output)
                    files["inputs"][then].write(rows, output)
            files["inputs"][then].sync()
        return block.details

    def _check_finite(self, index: int, output: torch.Tensor) -> None:
        if not torch.isfinite(output).all():
            raise CheckpointError(f"block {index} gives NaN or infinite values", where=str(self.checkpoint.folder))

    def _advance_targets(self, block: Block, now: Activations, then: Activations) -> None:
        """What the original has after the blocks that this one stands for."""
        if self.teacher is None or self._original is None:
            with torch.no_grad():
                for rows in self.batches():
                    then.write(rows, block.forward(rows, now.read(rows).to(self.device)))
        else:
            source = now  # never written: a resume starts from it
            for number in self.teacher.blocks(block.index):
                with torch.no_grad(), self._original.streamed.block(number) as module:
                    for rows in self.batches():
                        then.write(
                            rows, self._original.through(number, module, rows, source.read(rows).to(self.device))
                        )
                source = then
        then.sync()

    def _write(self, index: int, module: Any, changed: Mapping[str, TensorExtras]) -> None:
        """Round the block's weights to the checkpoint's dtypes, in the module too, and put those that changed on disk."""
        from safetensors.torch import save_file

        result: dict[str, torch.Tensor] = {}
        for key, parameter in module.named_parameters():
            stored = {n: v for n, v in self.streamed.stored_names(index, {key: parameter.data}).items() if self._own(n)}
            if not stored:
                continue
            for name, value in stored.items():
                before = self.checkpoint.tensor(name)
                found = changed.get(name, TensorExtras())
                mask = before.mask if found.mask is None else found.mask
                if found.codes is not None:
                    parts = {k: getattr(found.codes, k) for k in _CODES}
                    result |= {f"{name}:{k}": v.cpu().contiguous() for k, v in parts.items() if v is not None}
                if found.factors is not None:
                    up, down = (factor.to("cpu", before.data.dtype).contiguous() for factor in found.factors)
                    result |= {f"{name}:up": up, f"{name}:down": down}
                    continue
                data = value.to("cpu", before.data.dtype)
                if mask is not None:
                    mask = mask.to("cpu")
                    data = canonical(data, mask) if found.codes is None else data
                    result[f"{name}:keep"] = pack_bits(mask)
                if mask is not None or not torch.equal(data, before.data):
                    result[name] = data.contiguous().clone()
            dtype = torch_dtype(widest([self.checkpoint.spec.tensors[name].dtype for name in stored]))
            parameter.data.copy_(parameter.data.to(dtype))
        if self.processes.rank:
            return
        path = file_of(self.work / "blocks", index)
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = path.with_suffix(".tmp")
        save_file(result, temp)
        temp.replace(path)

    def _own(self, name: str) -> bool:
        """Whether a tensor of that name is stored, and no alias."""
        tensor = self.checkpoint.spec.tensors.get(name)
        return tensor is not None and tensor.alias_of is None

    # ---- resuming ----

    def _state(self) -> dict[str, Any] | None:
        """What an earlier run left; as the first process finds it, so that all go the same way."""
        state: dict[str, Any] | None
        try:
            state = json.loads((self.work / "state.json").read_text())
        except (OSError, ValueError):
            state = None
        state = self.processes.broadcast_object(0, state)
        return state

    def _save(self, state: Mapping[str, Any]) -> None:
        """Only when all processes have written their activations."""
        self.processes.barrier()
        if self.processes.rank:
            return
        temp = self.work / ".state.json.tmp"
        temp.parent.mkdir(parents=True, exist_ok=True)
        temp.write_text(json.dumps(state))
        temp.replace(self.work / "state.json")


@dataclass(frozen=True)
class RunnerResult:
    """The changed tensors, in a file per block; ``details`` has a row for each block."""

    folder: Path
    checkpoint: Checkpoint
    blocks: list[int]
    details: list[dict[str, Any]]

    def reader(self) -> Callable[[str], Value]:
        """A function from a tensor's name to its value: the changed one where there is one."""
        from safetensors import safe_open

        where: dict[str, Path] = {}
        for index in self.blocks:
            path = file_of(self.folder, index)
            if path.exists():
                with safe_open(path, framework="pt") as file:
                    where |= dict.fromkeys(file.keys(), path)

        def read(name: str) -> Value:
            if name not in where:
                return self.checkpoint.tensor(name)
            with safe_open(where[name], framework="pt") as file:
                data = file.get_tensor(name)
                keep = f"{name}:keep"
                mask = unpack_bits(file.get_tensor(keep), tuple(data.shape)) if keep in where else None
                found = {k: file.get_tensor(f"{name}:{k}") for k in _CODES if f"{name}:{k}" in where}
                codes = Codes(**found) if found else None
            return Value(data, mask, codes)

        return read

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of a tensor, [O, r] and [r, I]."""
        from safetensors import safe_open

        index = model_map(self.checkpoint.spec).block_of(name)
        assert index is not None
        with safe_open(file_of(self.folder, index), framework="pt") as file:
            return file.get_tensor(f"{name}:up"), file.get_tensor(f"{name}:down")


#: Fields of `Codes`.
_CODES = ("codes", "scale", "zero", "overall")


class _Unfollowable(Exception):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


def _without_cache(value: Any) -> Any:
    return None if type(value).__name__.endswith("Cache") else value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return (
            isinstance(b, (tuple, list)) and len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return bool(a == b) if not hasattr(a, "__dict__") else a is b or type(a) is type(b)
