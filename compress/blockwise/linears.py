"""The weight matrices of a block, each with the module whose input it multiplies, and the statistics of those inputs.

T tokens, I inputs and O outputs of a matrix, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from compress.blockwise.streamed import StreamedModel
from compress.errors import PassError


@dataclass
class TargetLinear:
    """One weight matrix of a block.

    Attributes:
        name: the tensor's name in the checkpoint. parameter: the block's own parameter that holds it.
        weight: a view of it with outputs along rows, [O, I]; writing to it changes the block.
        transposed: whether the checkpoint shapes it [I, O] (GPT-2's Conv1D). owner: the experts it belongs to.
        module: what is called with the matrix's inputs. group: sites of one group read the same inputs.
    """

    name: str
    parameter: str
    weight: torch.Tensor
    transposed: bool
    module: torch.nn.Module
    owner: Experts | None = None
    group: int = -1


@dataclass
class InputStatistics:
    """Sums over calibration tokens of a group's inputs: H = Σ x xᵀ [I, I], Σ x [I], and the number of tokens.

    While they are gathered, inputs wait until there are ``batch`` tokens, and of H only the upper part is kept.
    """

    hessian: torch.Tensor
    total: torch.Tensor = field(init=False)
    tokens: int = 0
    batch: int = 0
    _waiting: list[torch.Tensor] = field(default_factory=list)
    _count: int = 0

    def __post_init__(self) -> None:
        self.total = torch.zeros(len(self.hessian), dtype=torch.float64, device=self.hessian.device)

    def add(self, x: torch.Tensor) -> None:
        """Add inputs [T, I]."""
        self._waiting.append(x.float())
        self._count += len(x)
        self.tokens += len(x)
        if self._count >= self.batch:
            self._sum()

    def _sum(self) -> None:
        x = torch.cat(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
        self._waiting.clear()
        self._count = 0
        self.total += x.sum(0)
        for start, stop in _strips(x.shape[1]):
            into = self.hessian[start:stop, start:]
            if into.dtype == torch.float32:
                into.addmm_(x[:, start:stop].T, x[:, start:])
            else:
                into += x[:, start:stop].T @ x[:, start:]

    def finish(self) -> None:
        """Add what waits, and fill what lies below the diagonal strips from above them."""
        if self._waiting:
            self._sum()
        for start, stop in _strips(len(self.hessian)):
            self.hessian[stop:, start:stop] = self.hessian[start:stop, stop:].T

    def centred(self) -> torch.Tensor:
        """Σ (x - mean)(x - mean)ᵀ, in H's dtype."""
        total = self.total.to(self.hessian.dtype)
        return self.hessian.clone().addr_(total, total, alpha=-1 / max(1, self.tokens))

    def relative_error(self, before: torch.Tensor, after: torch.Tensor, centred: bool = False) -> float | None:
        """||(W - W')X||² over ||WX||², for weights [O, I]; None where no token was seen.

        Args:
            centred: a bias makes up for the mean of the difference.
        """
        if self.tokens == 0:
            return None
        hessian = self.hessian.float()
        lost = self.centred().float() if centred else hessian
        error = scale = 0.0
        for start in range(0, len(before), 512):  # a few rows at a time: matrices may be large
            weight = before[start : start + 512].float()
            difference = weight - after[start : start + 512]
            error += float(((difference @ lost) * difference).sum())
            scale += float(((weight @ hessian) * weight).sum())
        return error / scale if scale else 0.0


#: Rows of a symmetric sum that are added at a time, from the diagonal on. Measured on CPU: 128 takes nine tenths of 256's time.
_STRIP = 128
#: Tokens that float64 sums wait for: the float32 products in between are exact enough, and adding them takes time.
_TOKENS_PER_SUM = 4096


def _strips(width: int) -> list[tuple[int, int]]:
    return [(start, min(start + _STRIP, width)) for start in range(0, width, _STRIP)]


class Experts(torch.nn.Module):
    """Fused experts, run one by one through linear modules that share the fused parameters' memory.

    The computation is that of the fused module (Mixtral, Qwen3-MoE and their like: gate and up projection fused, an
    activation, a down projection), so that each expert's matrices are sites like any other.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.fused = fused
        count, double, _ = fused.gate_up_proj.shape
        self.act_fn = fused.act_fn
        self.gate, self.up, self.down = (torch.nn.ModuleList() for _ in range(3))
        for e in range(count):
            self.gate.append(_view(fused.gate_up_proj[e, : double // 2]))
            self.up.append(_view(fused.gate_up_proj[e, double // 2 :]))
            self.down.append(_view(fused.down_proj[e]))
        self.counted: torch.Tensor | None = None
        self.valid: torch.Tensor | None = None
        self.watch: Callable[[int, torch.Tensor, torch.Tensor], None] | None = (
            None  # expert, outputs [t, I], weights [t]
        )

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether a module is fused experts of that kind."""
        shapes: list[Any] = [getattr(getattr(module, n, None), "shape", ()) for n in ("gate_up_proj", "down_proj")]
        return (
            len(shapes[0]) == len(shapes[1]) == 3
            and (shapes[0][1] == 2 * shapes[1][2] and shapes[0][2] == shapes[1][1])
            and callable(getattr(module, "act_fn", None))
            and not getattr(module, "has_bias", False)
        )

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states [T, I], indices and weights of each token's experts [T, k] ▶ [T, I]."""
        result = torch.zeros_like(hidden_states)
        for e in range(len(self.gate)):
            token, place = torch.where(top_k_index == e)
            if not len(token):
                continue
            self.counted = None if self.valid is None else self.valid[token]
            state = hidden_states[token]
            state = self.down[e](self.act_fn(self.gate[e](state)) * self.up[e](state))
            if self.watch is not None:
                here = slice(None) if self.counted is None else self.counted
                self.watch(e, state[here], top_k_weights[token, place][here])
            result.index_add_(0, token, (state * top_k_weights[token, place, None]).to(result.dtype))
        return result


def _view(matrix: torch.Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(1, 1, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(matrix, requires_grad=False)
    return linear


def find_linears(
    streamed: StreamedModel, index: int, block: Any, wanted: Iterable[str]
) -> tuple[list[TargetLinear], list[tuple[Any, str, Experts]]]:
    """The sites of the wanted tensors of a block, in the order of its modules; and the fused experts to replace.

    Raises:
        PassError: a wanted tensor is no linear layer that the sweep can see.
    """
    from transformers.pytorch_utils import Conv1D

    parameters = dict(block.named_parameters())
    # which stored tensor is which parameter, by sending numbers through transformers' own conversion
    numbers = {name: float(i) for i, name in enumerate(parameters)}
    probes = {n: torch.full((1,) * p.ndim, numbers[n]) for n, p in parameters.items()}
    fused = {}
    for name, module in block.named_modules():
        if Experts.fits(module):
            fused[name] = module
            count = module.gate_up_proj.shape[0]
            codes = torch.arange(2 * count, dtype=torch.float32).view(count, 2, 1)
            probes[f"{name}.gate_up_proj"] = codes
            probes[f"{name}.down_proj"] = torch.arange(count, dtype=torch.float32).view(count, 1, 1)
    names = {}  # (parameter, code) ▶ stored name
    for parameter, probe in probes.items():
        for stored, value in streamed.stored_names(index, {parameter: probe}).items():
            names[parameter, int(value.flatten()[0])] = stored
    by_name: dict[str, TargetLinear] = {}
    swaps: list[tuple[Any, str, Experts]] = []
    for path, module in block.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)):
            parameter = f"{path}.weight"
            transposed = isinstance(module, Conv1D)
            data: torch.Tensor = module.weight.data
            stored = names[parameter, int(numbers[parameter])]
            by_name[stored] = TargetLinear(stored, parameter, data.T if transposed else data, transposed, module)
        elif path in fused:
            parent, _, child = path.rpartition(".")
            experts = Experts(module)
            swaps.append((block.get_submodule(parent), child, experts))
            for e in range(len(experts.gate)):
                for parameter, code, linear in (
                    (f"{path}.gate_up_proj", 2 * e, experts.gate[e]),
                    (f"{path}.gate_up_proj", 2 * e + 1, experts.up[e]),
                    (f"{path}.down_proj", e, experts.down[e]),
                ):
                    stored = names[parameter, code]
                    matrix: Any = linear.weight.data
                    by_name[stored] = TargetLinear(stored, parameter, matrix, False, linear, experts)
    wanted = set(wanted)
    if lost := sorted(wanted - by_name.keys()):
        raise PassError(
            f"{lost[0]} is no linear layer that the sweep can see",
            key="skip",
            fix=f"skip it: skip: [{lost[0].rpartition('.')[0]}], or use method: magnitude",
        )
    return [linear for linear in by_name.values() if linear.name in wanted], swaps


@contextmanager
def record_outputs(linears: Iterable[TargetLinear]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Within, what the modules of sites give is noted by their names, in the order of their first call."""
    outputs: dict[str, list[torch.Tensor]] = {}

    def listen(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
            outputs.setdefault(name, []).append(output)

        return hook

    handles = [linear.module.register_forward_hook(listen(linear.name)) for linear in linears]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def unfused(swaps: Sequence[tuple[Any, str, Experts]]) -> Iterator[None]:
    """Experts run one by one within."""
    try:
        for parent, child, experts in swaps:
            setattr(parent, child, experts)
        yield
    finally:
        for parent, child, experts in swaps:
            setattr(parent, child, experts.fused)


def group_linears(
    linears: Sequence[TargetLinear], run: Callable[[], Any]
) -> tuple[list[list[TargetLinear]], int | None]:
    """Sites that read the same tensor, found by running one small batch. Sites that saw none (cold experts) are alone.

    Returns:
        The groups, and which one reads last in a pass; None where that may depend on the tokens (experts).
    """
    seen: dict[str, list[torch.Tensor]] = {}
    order: list[str] = []
    handles = [
        s.module.register_forward_pre_hook(_remember(s.name, seen.setdefault(s.name, []), order)) for s in linears
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    groups: list[list[TargetLinear]] = []
    heads: list[torch.Tensor | None] = []
    for linear in linears:
        mine = seen[linear.name][0] if seen[linear.name] else None
        # the tensors are all alive, so equal addresses are the same tensor
        place = next((i for i, h in enumerate(heads) if h is not None and mine is not None and _same(h, mine)), None)
        if place is None and mine is None and linear.owner is not None:
            place = next((i for i, g in enumerate(groups) if heads[i] is None and _pair(g[0], linear)), None)
        if place is None:
            groups.append([])
            heads.append(mine)
            place = len(groups) - 1
        linear.group = place
        groups[place].append(linear)
    if any(linear.owner is not None or len(seen[linear.name]) != 1 for linear in linears):
        return groups, None
    last = max(range(len(groups)), key=lambda g: order.index(groups[g][0].name))
    return groups, last


def _remember(name: str, into: list[torch.Tensor], order: list[str]) -> Callable[..., None]:
    def hook(module: Any, args: tuple[Any, ...]) -> None:
        into.append(args[0])
        order.append(name)

    return hook


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())


def _pair(a: TargetLinear, b: TargetLinear) -> bool:
    """Gate and up projection of one expert."""
    if a.owner is None or a.owner is not b.owner:
        return False
    return any(a.module is g and b.module is u for g, u in zip(a.owner.gate, a.owner.up, strict=True))


@contextmanager
def collect_hessians(
    groups: Sequence[Sequence[TargetLinear]], dtype: Callable[[int], torch.dtype], device: str, last: int | None = None
) -> Iterator[list[InputStatistics]]:
    """Within, every forward pass of the block adds to the statistics of the groups; `set_token_mask` says which tokens count.

    With ``last`` a pass ends by `StopForward` once that group has its inputs: nothing after it is wanted.
    """
    statistics = []
    handles = []
    for number, group in enumerate(groups):
        width = group[0].weight.shape[1]
        hessian = torch.zeros(width, width, dtype=dtype(width), device=device)
        # of many experts each would hold its own waiting inputs
        waits = hessian.dtype == torch.float64 and group[0].owner is None
        sums = InputStatistics(hessian, batch=_TOKENS_PER_SUM if waits else 0)
        statistics.append(sums)
        handles.append(group[0].module.register_forward_pre_hook(_adder(group[0], sums, number == last)))
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()
    for sums in statistics:
        sums.finish()


class StopForward(Exception):
    """Ends a pass through a block whose statistics are complete."""


def _adder(linear: TargetLinear, sums: InputStatistics, last: bool) -> Callable[..., None]:
    def hook(module: Any, args: tuple[Any, ...]) -> None:
        x = args[0].detach().reshape(-1, args[0].shape[-1])
        counted = linear.owner.counted if linear.owner is not None else getattr(module, "counted", None)
        if counted is not None:
            x = x[counted]
        if len(x):
            sums.add(x)
        if last:
            raise StopForward

    return hook


def set_token_mask(
    groups: Sequence[Sequence[TargetLinear]], swaps: Sequence[tuple[Any, str, Experts]], mask: torch.Tensor | None
) -> None:
    """Say which tokens count in the next forward pass: bool [samples, length], None for all."""
    flat = None if mask is None else mask.flatten()
    for group in groups:
        module: Any = group[0].module
        module.counted = flat
    for _, _, experts in swaps:
        experts.valid = flat
