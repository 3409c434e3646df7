"""The linear layers of a block that a pass changes, by their names in the checkpoint.

I inputs and O outputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from compress.architectures.inference.roles import kind_of
from compress.architectures.model_map import model_map
from compress.blockwise.experts import Experts, ExpertSwap, rows_first
from compress.blockwise.kernels import geometry, is_kernel, patches
from compress.blockwise.routed import routing_lists
from compress.blockwise.streamed import StreamedModel, names_in_files
from compress.errors import PassError
from compress.spec.spec import Spec


@dataclass
class TargetLinear:
    """One weight matrix of a block.

    Attributes:
        name: the tensor's name in the checkpoint. parameter: the block's own parameter that holds it.
        weight: a view of it with outputs along rows, [O, I]; writing to it changes the block.
        transposed: whether the checkpoint shapes it [I, O]. owner: the experts it belongs to.
        module: the layer that is called with the matrix's inputs. group: linears of one group read the same inputs.
        sequence_first: whether these are [length, samples, I], as in Longformer's attention.
        kernel: whether it is that of a convolution, which the checkpoint shapes [O, inputs, *positions].
        routed: whether it reads the rows that a list of modules chooses for it (`compress.blockwise.routed`).
        part: where the checkpoint holds the matrix within a tensor of all experts; None where it has a tensor of its own.
        outputs: which outputs of the matrix ``weight`` has, where processes share it out; None for all.
    """

    name: str
    parameter: str
    weight: torch.Tensor
    transposed: bool
    module: torch.nn.Module
    owner: Experts | None = None
    group: int = -1
    sequence_first: bool = False
    part: ExpertPart | None = None
    kernel: bool = False
    routed: bool = False
    outputs: slice | None = None

    @property
    def tensor(self) -> str:
        """Name of the checkpoint's tensor that holds the matrix: its own, or that of all experts."""
        return self.name if self.part is None else self.part.tensor

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs or outputs of the layer as [T, …], the tokens of one sample after those of another; of a kernel, inputs."""
        if self.kernel:
            return patches(self.module, x)
        return (x.transpose(0, 1) if self.sequence_first else x).reshape(-1, x.shape[-1])

    def with_outputs(self, outputs: slice) -> TargetLinear:
        """Some outputs of the matrix, as a matrix; writing to it changes the block."""
        return replace(self, weight=self.weight[outputs], outputs=outputs)

    def own(self, values: torch.Tensor) -> torch.Tensor:
        """The matrix's own values [O, I] of values in the shape of the checkpoint's tensor."""
        values = values.mT if self.transposed else values
        values = values.flatten(1) if self.kernel else values
        values = values if self.part is None else values[self.part.expert, self.part.rows]
        return values if self.outputs is None else values[self.outputs]

    def gradient(self, parameters: Mapping[str, torch.nn.Parameter]) -> torch.Tensor | None:
        """The gradient of the matrix, float32 [O, I], from those of the block's parameters; None where it has none.

        So it is where the block does not use the matrix, such as the cross-attention of a decoder alone.
        """
        whole = parameters[self.parameter]
        if whole.grad is None:
            return None
        assert whole.is_contiguous()
        start = self.weight.storage_offset() - whole.storage_offset()
        return whole.grad.contiguous().as_strided(self.weight.shape, self.weight.stride(), start).float()

    def stored(self, values: torch.Tensor) -> torch.Tensor:
        """Values [O, I] in the shape of the checkpoint's tensor, contiguous; of experts, those of all."""
        if self.kernel:
            return values.reshape(self.module.get_parameter("weight").shape).contiguous()
        return (values.mT if self.transposed else values).contiguous()


@dataclass(frozen=True)
class ExpertPart:
    """Some rows of one expert in a tensor [E, O, I] of the checkpoint, or [E, I, O]."""

    tensor: str
    expert: int
    rows: slice


def find_linears(
    streamed: StreamedModel, index: int, block: Any, wanted: Iterable[str]
) -> tuple[list[TargetLinear], list[ExpertSwap]]:
    """The wanted linears of a loaded block, in the order of its modules; and the fused experts to replace.

    Args:
        index: number of the block. block: its module. wanted: names of tensors in the checkpoint.

    Raises:
        PassError: a wanted tensor is not a linear layer that the block runs.
    """
    by_name, swaps = _linears_of(streamed, index, block)
    wanted = set(wanted)
    if missing := sorted(wanted - {linear.tensor for linear in by_name.values()}):
        raise PassError(
            f"{missing[0]} is not a linear layer that calibrated methods reach",
            key="skip",
            fix=f"skip it: skip: [{missing[0].rpartition('.')[0]}], or use method: magnitude",
        )
    return [linear for linear in by_name.values() if linear.tensor in wanted], swaps


def out_of_reach(streamed: StreamedModel, wanted: Mapping[int, set[str]]) -> set[str]:
    """The wanted tensors, by block, that are no linear layers of the class: it splits, joins or multiplies them otherwise."""
    missing: set[str] = set()
    for index, names in wanted.items():
        with streamed.block(index) as block:  # transformers knows the way back to the files of what it has loaded alone
            by_name, _ = _linears_of(streamed, index, block)
        missing |= names - {linear.tensor for linear in by_name.values()}
    return missing


def _linears_of(streamed: StreamedModel, index: int, block: Any) -> tuple[dict[str, TargetLinear], list[ExpertSwap]]:
    """All linears of a loaded block by name, and its fused experts."""
    matrices = model_map(streamed.checkpoint.spec).linears
    fused = {path: module for path, module in block.named_modules() if Experts.fits(module)}
    # of tensors of all experts that are run otherwise one entry is too little for the way back, and no layer reads them
    kernels = {f"{path}.weight" for path, module in block.named_modules() if is_kernel(module)}
    few = [(name, p) for name, p in block.named_parameters() if p.ndim < 3 or name in kernels]
    probes = {name: torch.zeros((1,) * p.ndim) for name, p in few}
    probes |= _expert_probes(fused)
    names = _stored_names(probes, lambda parameters: streamed.stored_names(index, parameters))
    by_name: dict[str, TargetLinear] = {}
    swaps: list[ExpertSwap] = []
    routing = tuple(f"{path}." for path in routing_lists(block))
    for path, module in block.named_modules():
        parameter = f"{path}.weight"
        stored = names.get((parameter, 0), "")
        transposed = stored in matrices and matrices[stored].transposed and path not in fused
        if transposed or kind_of(module) == "linear":
            data: torch.Tensor = module.weight.data
            if stored not in matrices or matrices[stored].tensor.shape != tuple(data.shape):
                continue  # the files hold its rows in several tensors
            matrix = data.T if transposed else data
            routed = path.startswith(routing)
            by_name[stored] = TargetLinear(stored, parameter, matrix, transposed, module, routed=routed)
        elif is_kernel(module) and stored in matrices and matrices[stored].tensor.shape == tuple(module.weight.shape):
            matrix = module.weight.data.view(len(module.weight), -1)
            by_name[stored] = TargetLinear(stored, parameter, matrix, False, module, kernel=True)
        elif path in fused:
            parent, _, child = path.rpartition(".")
            experts = Experts(module)
            swaps.append(ExpertSwap(block.get_submodule(parent), child, experts))
            start = f"{streamed.path_of(index)}."
            linears = _expert_linears(path, experts, names, start, streamed.checkpoint.spec)
            by_name |= {linear.name: linear for linear in linears}
    return by_name, swaps


def expert_linears(model: Any, spec: Spec) -> tuple[dict[str, TargetLinear], list[ExpertSwap]]:
    """The matrices of all fused experts of a loaded model by their names in the files, and the modules to replace."""
    fused = {path: module for path, module in model.named_modules() if Experts.fits(module)}
    names = _stored_names(_expert_probes(fused), lambda parameters: names_in_files(model, spec, parameters))
    by_name: dict[str, TargetLinear] = {}
    swaps: list[ExpertSwap] = []
    for path, module in fused.items():
        parent, _, child = path.rpartition(".")
        experts = Experts(module)
        swaps.append(ExpertSwap(model.get_submodule(parent), child, experts))
        by_name |= {linear.name: linear for linear in _expert_linears(path, experts, names, "", spec)}
    return by_name, swaps


def _stored_names(
    probes: Mapping[str, torch.Tensor], stored_names: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]
) -> dict[tuple[str, int], str]:
    """The checkpoint's name of each part of each parameter, by (parameter, number of the part).

    A parameter has one part, number 0, and its name is not always the checkpoint's: transformers renames, splits and fuses
    weights while it loads, by rules that differ by family and version. Its saving code knows the way back, but it
    only converts values. So this function sends values that tell where they came from: each part is filled with its own
    number, and the number that arrives under a stored name says which part that name holds. The gate, up and
    down matrices of fused experts are the parts 2e, 2e + 1 (of ``gate_up_proj``) and e (of ``down_proj``). One entry
    along each other axis is enough, so the conversion costs nothing.

    Where the checkpoint holds all experts in one tensor, all numbers arrive under one name: part ``-1``, or ``-2`` if gate and
    up lie along the last axis of that tensor, so that it is [E, I, O].
    """
    names = {}
    for parameter, probe in probes.items():
        for stored, value in stored_names({parameter: probe}).items():
            if value.numel() > 1:
                names[parameter, -1 if value.shape[-1] == 1 else -2] = stored
            else:
                names[parameter, int(value.flatten()[0])] = stored
    return names


def _expert_probes(fused: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Numbers in place of the parameters of fused experts, by path."""
    probes = {}
    for path, module in fused.items():
        count = module.gate_up_proj.shape[0]
        for name, rows in (("gate_up_proj", 2), ("down_proj", 1)):
            probe = torch.arange(rows * count, dtype=torch.float32).view(count, rows, 1)
            probes[f"{path}.{name}"] = rows_first(module, probe).contiguous()
    return probes


def _expert_linears(
    path: str, experts: Experts, names: Mapping[tuple[str, int], str], start: str, spec: Spec
) -> Iterator[TargetLinear]:
    """The matrices of fused experts. ``start``: path of the block in memory, with the dot."""
    gate, up = experts.rows
    turned = _turned(path, experts, names, spec)
    for e in range(len(experts.gate)):
        for kind, parameter, part, rows, module in (
            ("gate_proj", f"{path}.gate_up_proj", 2 * e, gate, experts.gate[e]),
            ("up_proj", f"{path}.gate_up_proj", 2 * e + 1, up, experts.up[e]),
            ("down_proj", f"{path}.down_proj", e, slice(None), experts.down[e]),
        ):
            matrix: Any = module.weight.data
            if (name := names.get((parameter, part))) is not None:
                yield TargetLinear(name, parameter, matrix, False, module, experts)
                continue
            if (tensor := names.get((parameter, -2)) or names.get((parameter, -1))) is None:
                continue  # the files split it otherwise
            own = f"{start}{path}.{e}.{kind}.weight"
            yield TargetLinear(own, parameter, matrix, turned, module, experts, part=ExpertPart(tensor, e, rows))


def _turned(path: str, experts: Experts, names: Mapping[tuple[str, int], str], spec: Spec) -> bool:
    """Whether the files hold tensors of all experts as [E, I, O]; a class may read both ways, so that shapes tell."""
    views: tuple[tuple[str, Any, int], ...] = (
        ("down_proj", experts.down[0], 1),
        ("gate_up_proj", experts.up[0], 2),
    )
    for parameter, view, outputs in views:
        name = names.get((f"{path}.{parameter}", -2)) or names.get((f"{path}.{parameter}", -1))
        rows, columns = view.weight.shape
        if name is not None and name in spec.tensors and outputs * rows != columns:  # not both are square
            return spec.tensors[name].shape[1:] == (columns, outputs * rows)
    return (f"{path}.gate_up_proj", -2) in names


@contextmanager
def record_outputs(linears: Iterable[TargetLinear]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Within, record the outputs of the linears by name, in the order of their first call."""
    outputs: dict[str, list[torch.Tensor]] = {}

    def listen(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            outputs.setdefault(name, []).append(first_value(output))

        return hook

    handles = [linear.module.register_forward_hook(listen(linear.name)) for linear in linears]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def first_value(output: Any) -> torch.Tensor:
    """The output of a layer: the first of several values, as I-BERT's layers have a scale beside it."""
    result: torch.Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return result


def group_linears(
    linears: Sequence[TargetLinear], run: Callable[[], Any]
) -> tuple[list[list[TargetLinear]], list[str]]:
    """Linears that read the same tensor, found by running one sample. Linears that read none (cold experts) are alone.

    Returns:
        The groups, and the names of the linears that read once in every pass, in the order of reading; no experts.
    """
    inputs: dict[str, list[_Read]] = {linear.name: [] for linear in linears}
    order: list[str] = []
    handles = [s.module.register_forward_pre_hook(_remember(s.name, inputs[s.name], order)) for s in linears]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    groups: list[list[TargetLinear]] = []
    heads: list[list[_Read]] = []
    for linear in linears:
        own = inputs[linear.name]
        linear.sequence_first = bool(own) and own[0][0].shape[1:-1] == (1,) and len(own[0][0]) > 1
        alike = (i for i, h in enumerate(heads) if own and _same(h, own))
        place = next((i for i in alike if _patches(groups[i][0]) == _patches(linear)), None)
        if place is None and not own and linear.owner is not None:
            place = next((i for i, g in enumerate(groups) if not heads[i] and _pair(g[0], linear)), None)
        if place is None:
            groups.append([])
            heads.append(own)
            place = len(groups) - 1
        linear.group = place
        groups[place].append(linear)
    everywhere = [linear.name for linear in linears if linear.owner is None and not linear.routed]
    single = {name for name in everywhere if len(inputs[name]) == 1}
    return groups, [name for name in order if name in single]


#: A tensor that a layer was called with, and how often it had been written to by then.
_Read = tuple[torch.Tensor, int]


def _remember(name: str, into: list[_Read], order: list[str]) -> Callable[..., None]:
    def hook(module: Any, args: tuple[Any, ...]) -> None:
        into.append((args[0], 0 if args[0].is_inference() else args[0]._version))
        order.append(name)

    return hook


def _same(a: Sequence[_Read], b: Sequence[_Read]) -> bool:
    """Whether two layers read the same in each of their calls. All tensors are alive: equal addresses are equal tensors."""
    if len(a) != len(b):
        return False
    pairs = ((x, y) for (x, before), (y, now) in zip(a, b, strict=True) if before == now)
    same = (x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride() for x, y in pairs)
    return sum(same) == len(a)


def _patches(linear: TargetLinear) -> tuple[Any, ...]:
    """Equal for layers that make the same rows of the same input."""
    return geometry(linear.module) if linear.kernel else ()


def _pair(a: TargetLinear, b: TargetLinear) -> bool:
    """Whether two linears are gate and up projection of one expert."""
    if a.owner is None or a.owner is not b.owner:
        return False
    return any(a.module is g and b.module is u for g, u in zip(a.owner.gate, a.owner.up, strict=True))
