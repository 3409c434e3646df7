"""The divergence of a model's output when one matrix changes, measured by gradients on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from compress.architectures.model_map import ModelMap, model_map
from compress.blockwise.block import Block
from compress.blockwise.hessians import tensor_cores
from compress.blockwise.linears import TargetLinear, expert_linears, first_value, group_linears
from compress.blockwise.memory_budget import PROBE_BYTES
from compress.blockwise.probe import ProbeFn
from compress.blockwise.results import TensorExtras
from compress.blockwise.runner import BlockRunner
from compress.checkpoint.values import Checkpoint
from compress.data.batches import Batches
from compress.errors import PassError
from compress.models.loading import load_for_samples
from compress.progress import Progress
from compress.sensitivity.output_curvature import Gradients
from compress.sensitivity.samples import SampleLoop, token_losses
from compress.solvers.memory import parts_of
from compress.solvers.quant_format import dequantize, fit, to_codes
from compress.solvers.trellis import likely_error
from compress.spec.formats import QuantFormat

#: Rows of a matrix, at least, that tell the squared error of an option beside that of another one.
_ROWS = 64
#: Samples that are enough to rank matrices by.
SAMPLES = 32
#: A layer and its weights [O, I] ▶ the change ΔW [O, I] of each choice.
WeightDeltas = Callable[[TargetLinear, torch.Tensor], Mapping[str, torch.Tensor]]


class RoundingDelta:
    """The change of rounding to the nearest codes, as `WeightDeltas`.

    One of some options is measured; the divergence of the others is its divergence, scaled by the squared error of some rows.
    """

    def __init__(self, quant_formats: Callable[[str, str], QuantFormat], options: Mapping[str, str]) -> None:
        """``quant_formats``: (tensor, option) ▶ its format. ``options``: option ▶ the option that it is measured by."""
        self.quant_formats, self.options = quant_formats, options
        self.errors: dict[str, dict[str, float]] = {}

    def __call__(self, linear: TargetLinear, W_OI: torch.Tensor) -> dict[str, torch.Tensor]:
        """ΔW of the options to measure, bfloat16."""
        deltas, errors = {}, self.errors.setdefault(linear.tensor, {})
        some = W_OI[:: max(1, len(W_OI) // _ROWS)]
        for option, measured in self.options.items():
            quant_format = self.quant_formats(linear.tensor, option)
            if option == measured:
                deltas[option] = _rounding_error(W_OI, quant_format).to(torch.bfloat16)
            if list(self.options.values()).count(measured) > 1:
                errors[option] = errors.get(option, 1e-30) + float(_rounding_error(some, quant_format).square().sum())
        return deltas

    def scaled(self, measured: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
        """The divergences of all options, from those that were measured."""
        return {
            name: {
                o: row[o] if o == m else row[m] * self.errors[name][o] / self.errors[name][m]
                for o, m in self.options.items()
            }
            for name, row in measured.items()
        }


def _rounding_error(W_OI: torch.Tensor, quant_format: QuantFormat) -> torch.Tensor:
    """Nearest codes less the weights, float32 [O, I]; of trellis codes, which take long to find, an error of the same size."""
    if quant_format.is_trellis:
        return likely_error(W_OI, quant_format.bits)
    return dequantize(to_codes(W_OI, quant_format, fit(W_OI, quant_format), torch.float32)).float() - W_OI


class Divergences(NamedTuple):
    """By tensor and choice, nats per token; the tensors in groups that read the same inputs; and a row for each block."""

    by_tensor: dict[str, dict[str, float]]
    groups: list[list[str]]
    rows: list[dict[str, Any]]


def block_divergences(runner: BlockRunner, title: str, probe: ProbeFn, setting: tuple[str, str]) -> Divergences:
    """The same as `divergences`, with one block and some changes of its matrices in memory at a time.

    Args:
        runner: of the model as it is. title: of the progress bar. probe: yields the changes of a block's matrices. It may write
            to ``block.details``, which are the rows of the result.

    Raises:
        PassError: the model predicts no tokens.
    """
    gradients = Gradients(runner.executor, runner.workspace.folder("gradients"), runner.progress)
    gradients.samples = min(gradients.samples, SAMPLES)
    mapped = model_map(runner.checkpoint.spec)

    def measure(block: Block) -> dict[str, TensorExtras]:
        if not gradients.known:
            raise PassError(f"{setting[0]} needs a model that predicts tokens", fix=setting[1])
        linears = {linear.name: linear for linear in block.linears}
        divergence: dict[str, dict[str, float]] = {}
        deltas: dict[str, dict[str, torch.Tensor]] = {}
        for name, trials in probe(block):
            deltas[name] = {choice: delta.to(torch.bfloat16) for choice, delta in trials.items()}
            if sum(2 * delta.numel() for row in deltas.values() for delta in row.values()) >= PROBE_BYTES:
                divergence |= _of_block(block, linears, deltas, gradients)
                deltas.clear()
        divergence |= _of_block(block, linears, deltas, gradients)
        block.details["divergence"] = by_tensor(linears, with_cold_experts(mapped, linears, divergence))
        block.details["groups"] = [list(dict.fromkeys(linear.tensor for linear in group)) for group in block.groups]
        return {}

    rows: list[Any] = list(runner.run(measure, title, before=gradients.measure).details)
    return Divergences(
        {name: row for block in rows for name, row in block.get("divergence", {}).items()},
        [group for block in rows for group in block.get("groups", ())],
        rows,
    )


def _of_block(
    block: Block,
    linears: Mapping[str, TargetLinear],
    deltas: Mapping[str, Mapping[str, torch.Tensor]],
    gradients: Gradients,
) -> dict[str, dict[str, float]]:
    """Divergences by matrix and choice of some matrices of a block."""
    sums = {name: dict.fromkeys(row, 0.0) for name, row in deltas.items()}
    handles = [linears[n].module.register_forward_hook(_product_hook(row, sums[n])) for n, row in deltas.items()]
    tokens = 0
    try:
        for rows in gradients.replay(block) if deltas else ():
            mask = block.token_mask(rows)
            tokens += len(rows) * gradients.executor.inputs.length if mask is None else int(mask.sum())
    finally:
        for handle in handles:
            handle.remove()
    totals = [total for row in sums.values() for total in row.values()]
    seen, *totals = block.view.processes.reduce_sum(tokens, *totals)
    left = iter(totals)
    return {name: {choice: 0.5 * next(left) / max(seen, 1) for choice in row} for name, row in sums.items()}


def divergences(
    checkpoint: Checkpoint,
    names: Sequence[str],
    changes: WeightDeltas,
    batches: Batches,
    *,
    setting: tuple[str, str],
    device: str,
    seed: int,
    progress: Progress,
) -> tuple[dict[str, dict[str, float]], list[list[str]]]:
    """Expected divergence of the model's output, in nats per token, if one matrix alone were changed.

    To second order KL is ½ E (gᵀ ΔW x)², with x a token's inputs of the matrix and g the gradient, at its outputs, of the
    log-likelihood of a token drawn from the model's own prediction (the Fisher information). The whole model is in memory,
    with every ΔW in bfloat16, and its activations for one sample at a time.

    Args:
        batches: calibration samples. setting: the recipe setting that asks for this, and what to do without it, for errors.

    Returns:
        By tensor and choice; and the tensors in groups that read the same inputs.

    Raises:
        PassError: the model predicts no tokens, or a tensor is not a module's own weight.
    """
    mapped = model_map(checkpoint.spec)
    model: Any = load_for_samples(checkpoint, dtype="float32", device=device)
    if not model.can_generate() and model.get_output_embeddings() is None:
        raise PassError(f"{setting[0]} needs a model that predicts tokens", fix=setting[1])
    model.requires_grad_(False)
    linears = _linears_of(model, mapped, names, setting)
    deltas = _deltas(linears, changes, device)
    with torch.no_grad():
        groups, _ = group_linears([*linears.values()], lambda: model(**batches.first(1).inputs(device)))
    loop = SampleLoop(batches.first(SAMPLES), device)
    sums = {name: dict.fromkeys(row, 0.0) for name, row in deltas.items()}
    handles = []
    for name, linear in linears.items():
        users = [user for source, user in users_of(mapped, names) if source == name and user != name]
        shared = (mapped.in_memory(user.removesuffix(".weight")) for user in users)
        for module in [linear.module, *map(model.get_submodule, shared)]:
            handles.append(module.register_forward_hook(_product_hook(deltas[name], sums[name])))
    for embeddings in (m for m in model.modules() if isinstance(m, torch.nn.Embedding)):  # an encoder may have its own
        handles.append(embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(True)))
    generator = torch.Generator(device).manual_seed(seed)
    tokens = 0
    for sample in loop.with_progress(progress, "measuring what changes cost"):
        losses = token_losses(model, sample, generator)
        tokens += len(losses)
        losses.sum().backward()  # type: ignore[no-untyped-call]
    for handle in handles:
        handle.remove()
    divergence = {name: {o: 0.5 * total / max(tokens, 1) for o, total in row.items()} for name, row in sums.items()}
    divergence = by_tensor(linears, with_cold_experts(mapped, linears, divergence))
    return divergence, [list(dict.fromkeys(linear.tensor for linear in group)) for group in groups]


def _linears_of(
    model: Any, mapped: ModelMap, names: Sequence[str], setting: tuple[str, str]
) -> dict[str, TargetLinear]:
    """The layers of the tensors, by name. Fused experts among them are replaced in the model, and run one by one.

    Raises:
        PassError: a tensor is not a module's own weight.
    """
    modules = dict(model.named_modules())
    linears: dict[str, TargetLinear] = {}
    experts: dict[str, list[TargetLinear]] = {}
    if any(mapped.is_expert(name) for name in names):
        matrices, swaps = expert_linears(model, mapped.spec)
        for linear in matrices.values():
            experts.setdefault(linear.tensor, []).append(linear)
        for parent, child, swapped in swaps:
            setattr(parent, child, swapped)
    for name in names:
        weight = getattr(module := modules.get(mapped.in_memory(name.removesuffix(".weight"))), "weight", None)
        if name in experts:
            linears |= {linear.name: linear for linear in experts[name]}
        elif module is not None and weight is not None and not mapped.linears[name].kernel:
            transposed = mapped.linears[name].transposed
            linears[name] = TargetLinear(name, name, weight.T if transposed else weight, transposed, module)
        else:
            raise PassError(f"{setting[0]} does not reach {name}: it is not a module of its own", fix=setting[1])
    return linears


def _deltas(
    linears: Mapping[str, TargetLinear], changes: WeightDeltas, device: str
) -> dict[str, dict[str, torch.Tensor]]:
    """ΔW [O, I] by tensor and choice, bfloat16: its eight bits of precision are enough."""
    deltas = {}
    for name, linear in linears.items():
        choices = changes(linear, linear.weight.float().contiguous())
        deltas[name] = {choice: delta.to(device, torch.bfloat16) for choice, delta in choices.items()}
    return deltas


def by_tensor(
    linears: Mapping[str, TargetLinear], divergence: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Divergences by tensor: the sum of its matrices'."""
    totals: dict[str, dict[str, float]] = {}
    for name, row in divergence.items():
        total = totals.setdefault(linears[name].tensor, dict.fromkeys(row, 0.0))
        for choice, value in row.items():
            total[choice] += value
    return totals


def with_cold_experts(
    mapped: ModelMap, linears: Mapping[str, TargetLinear], divergence: dict[str, dict[str, float]]
) -> dict[str, dict[str, float]]:
    """Divergences where an expert that no token reached has the mean of the block's other experts, not none."""
    rows: dict[tuple[Any, ...], list[str]] = {}
    for name in divergence:
        if (part := linears[name].part) is not None:
            rows.setdefault((part.tensor, str(part.rows)), []).append(name)
        elif mapped.is_expert(name):
            linear = mapped.linears[name]
            rows.setdefault((linear.block, mapped.record.starred(linear.part)), []).append(name)
    for names in rows.values():
        reached = [name for name in names if any(divergence[name].values())]
        for name in set(names) - set(reached) if reached else ():
            divergence[name] = {o: sum(divergence[n][o] for n in reached) / len(reached) for o in divergence[name]}
    return divergence


def users_of(mapped: ModelMap, names: Sequence[str]) -> list[tuple[str, str]]:
    """Each tensor with each name that it has: its own, and those of blocks that share it."""
    known = set(names)
    aliases = [
        (tensor.alias_of, tensor.name)
        for tensor in mapped.spec.tensors.values()
        if tensor.alias_of in known and mapped.block_of(tensor.name) is not None
    ]
    return [*((name, name) for name in names), *((source, name) for source, name in aliases if source is not None)]


def _product_hook(deltas: Mapping[str, torch.Tensor], sums: dict[str, float]) -> Callable[..., None]:
    """A forward hook that adds Σ over tokens of (gᵀ ΔW x)² to ``sums`` for each choice, once g is known.

    Padding needs no mask: its g is zero, as no prediction that counts depends on it.
    """

    def forward(module: Any, args: tuple[Any, ...], output: Any) -> None:
        inputs = args[0].detach()

        def backward(gradients: tuple[torch.Tensor, ...]) -> None:
            g = gradients[0].reshape(-1, gradients[0].shape[-1])
            x, g = inputs.reshape(-1, inputs.shape[-1])[moved := g.any(-1)].float(), g[moved].float()
            for choice, delta in deltas.items():
                with tensor_cores(x, tiles=True):
                    products = [((x @ delta[rows].float().T) * g[:, rows]).sum(1) for rows in parts_of(delta)]
                sums[choice] += float(torch.stack(products).sum(0).double().square().sum())

        _behind(first_value(output)).register_prehook(backward)

    return forward


def _behind(output: torch.Tensor) -> Any:
    """The node that made a layer's output; a class may change the output in place, by which a view loses its own node."""
    base = output._base
    return output.grad_fn if base is None or base.numel() != output.numel() else base.grad_fn
