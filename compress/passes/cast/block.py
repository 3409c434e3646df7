"""Casting one block to codes: statistics ▶ scales ▶ GPTQ ▶ QuantEase ▶ YAQA, then reconstruction of scales and floats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from compress.architectures.model_map import model_map
from compress.blockwise.asymmetric import statistics_of, symmetric_statistics
from compress.blockwise.block import Block
from compress.blockwise.correction import InputMismatch
from compress.blockwise.hessians import InputStatistics
from compress.blockwise.linears import TargetLinear
from compress.blockwise.memory_budget import SAMPLES_PER_STEP
from compress.blockwise.reconstruct import (
    ComputedParameter,
    Reconstruction,
    TrainableTensor,
    reconstruct_block,
    trainable_floats,
)
from compress.blockwise.results import TensorExtras, extras_by_tensor
from compress.blockwise.solve import GroupToSolve, MatrixSolver, solve_block
from compress.blockwise.spilled import SpilledByName
from compress.checkpoint.values import Checkpoint, Codes, torch_dtype
from compress.passes.base import Context
from compress.passes.blockwise import open_runner
from compress.passes.cast.global_scales import GlobalScales
from compress.passes.cast.plan import FINE
from compress.passes.cast.settings import CastSettings
from compress.passes.cast.solve import (
    Case,
    CaseGroup,
    compact,
    compensate_together,
    experts_together,
    solve_matrix,
)
from compress.passes.cast.trellis import TrellisRounded, solve_trellis
from compress.sensitivity.output_curvature import Gradients
from compress.solvers.quant_format import Scales, dequantize, fit, to_codes
from compress.spec.formats import QuantFormat
from compress.spec.spec import Spec


@dataclass(frozen=True)
class CastOptions:
    """How to cast blocks.

    Attributes:
        reconstruction: reconstruction of each block after rounding; None for none.
        quant_formats: format of every tensor to cast.
        dtypes: dtypes of stored scales, by tensor.
        asymmetric: match the original's outputs on the original's inputs, if the runner has targets (GPTAQ).
        alternating: after GPTQ, improve codes and scales in turns (QuantEase; YAQA's descent where there are gradients).
        gradients: measured gradients weigh output errors by their effect on the prediction (YAQA).
        overall: scales of nvfp4's scales; None for those of each matrix alone.
    """

    reconstruction: Reconstruction | None
    quant_formats: Mapping[str, QuantFormat]
    dtypes: Mapping[str, torch.dtype]
    asymmetric: bool = True
    alternating: bool = True
    gradients: Gradients | None = None
    overall: GlobalScales | None = None


class Rounded:
    """A matrix as codes and scales. Reconstruction trains the scales."""

    def __init__(
        self,
        linear: TargetLinear,
        quant_format: QuantFormat,
        codes: torch.Tensor,
        scales: Scales,
        keep: torch.Tensor | None,
    ) -> None:
        self.linear, self.quant_format, self.keep = linear, quant_format, keep
        self.scale, self.zero, self.overall = scales.scale, scales.zero, scales.overall
        #: Codes less zero points [O, G, S], in the dtype of `compact`.
        self.codes = codes.view(len(codes), self.scale.shape[1], -1)
        self._stored: Codes | None = None

    def values(self) -> torch.Tensor:
        """The rounded weights [O, I]."""
        return (self.codes * self.scale[..., None]).view(len(self.codes), -1)

    def project(self) -> None:
        """Write the rounded weights into the block."""
        self.linear.weight.copy_(self.values())

    def chain_gradients(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Set the gradients of the scales from those of the weights."""
        gradient = self.linear.gradient(parameters)
        if gradient is not None:
            self.scale.grad = (gradient.reshape(self.codes.shape) * self.codes).sum(2)

    def finish(self, dtype: torch.dtype) -> Codes:
        """Return the codes with stored scales, and write the weights that a loader will see into the block.

        Called again, it returns the same: nothing is trained behind it.
        """
        if self._stored is None:
            scales = Scales(self.scale, self.zero, self.overall)
            self._stored = to_codes(self.values(), self.quant_format, scales, dtype, self.keep)
            self.linear.weight.copy_(dequantize(self._stored, self.keep).to(self.linear.weight.dtype))
        return self._stored


class CastSolver(MatrixSolver[Rounded | TrellisRounded]):
    """Solver of `cast_block`. ``tuned``: scales are trained afterwards."""

    def __init__(self, block: Block, options: CastOptions, tuned: bool) -> None:
        self._block, self._options, self._tuned = block, options, tuned
        curvature = {} if options.gradients is None else options.gradients.by_outputs(block)
        self._curvature, self._coupled = SpilledByName(block.inputs.path.parent, curvature), set(curvature)

    def independent_outputs(self, linear: TargetLinear) -> bool:
        """Integers with scales of each output, without output curvature."""
        quant_format = self._options.quant_formats[linear.tensor]
        alone = quant_format.is_integer and quant_format.height(len(linear.weight)) == 1
        return alone and not quant_format.is_trellis and linear.name not in self._coupled

    def groups_together(self, linears: Sequence[TargetLinear]) -> int:
        """So many that a step of GPTQ takes longer than its calls."""
        return experts_together(linears)

    def prepare(self, groups: Sequence[GroupToSolve]) -> None:
        """Round small matrices with the same inputs and formats by one pass over their columns, and small experts too."""
        cases = [[self._case(linear) for linear in group.linears] for group in groups]
        compensate_together([CaseGroup(own, *group[1:]) for own, group in zip(cases, groups, strict=True) if own])

    def solve(
        self, linear: TargetLinear, statistics: InputStatistics, mismatch: InputMismatch | None, shared: dict[str, Any]
    ) -> tuple[Rounded | TrellisRounded, dict[str, Any]]:
        """Codes and scales of a matrix, with its row for the report."""
        case, F = self._case(linear), self._curvature.take(linear.name)
        if case.quant_format.is_trellis:
            solution, row = solve_trellis(linear, statistics, mismatch, case.quant_format, shared)
            return solution, {"format": case.quant_format.format, **row}
        codes, scales, row = solve_matrix(case, statistics, mismatch, self._options.alternating, shared, F)
        rounded = Rounded(linear, case.quant_format, codes, scales, case.keep)
        return rounded, {"format": case.quant_format.format, **row}

    def _case(self, linear: TargetLinear) -> Case:
        overall = None if self._options.overall is None else self._options.overall.of(linear.tensor)
        quant_format = self._options.quant_formats[linear.tensor]
        return Case(linear, quant_format, self._block.earlier_mask(linear), overall)

    def blank(self, linear: TargetLinear) -> Rounded | TrellisRounded:
        """Codes and scales of the right shapes."""
        keep, quant_format = self._block.earlier_mask(linear), self._options.quant_formats[linear.tensor]
        weight = linear.weight.float().contiguous()
        if quant_format.is_trellis:
            states = torch.empty(weight.shape, dtype=torch.int16, device=weight.device)
            return TrellisRounded(linear, quant_format, states, weight.new_empty(len(weight), 1))
        scales = fit(weight, quant_format, None, keep, search=False)
        return Rounded(linear, quant_format, compact(torch.empty_like(weight), quant_format), scales, keep)

    def tensors(self, solution: Rounded | TrellisRounded) -> list[torch.Tensor]:
        """Codes and scales."""
        parts = (solution.codes, solution.scale, solution.zero, solution.overall)
        return [part for part in parts if part is not None]

    def place(self, linear: TargetLinear, solution: Rounded | TrellisRounded) -> None:
        """Write the rounded weights into the block, with the scales that are stored unless these are trained first."""
        if self._tuned:
            solution.project()
        else:
            solution.finish(self._options.dtypes[linear.tensor])


def cast_blocks(
    checkpoint: Checkpoint, spec: Spec, settings: CastSettings, context: Context, overall: GlobalScales
) -> Any:
    """Cast all blocks; return a function that reads a tensor of the result."""
    record = model_map(spec).record
    quant_formats = {
        t.name: t.quant_format
        for t in spec.stored()
        if t.quant_format is not None and record.block_index(t.name) is not None
    }
    if not quant_formats:  # only embeddings, which are rounded when read
        return checkpoint.tensor
    coarse = any(quant_format.bits < FINE for quant_format in quant_formats.values())
    reconstruction = (
        Reconstruction(
            settings.reconstruction_epochs, settings.reconstruction_lr, SAMPLES_PER_STEP["scales"], bfloat16=False
        )
        if settings.reconstruction_epochs and coarse
        else None
    )
    dtypes = {n: torch_dtype(spec.tensors[n].dtype) for n in quant_formats}
    correction = settings.correction(quant_formats.values()) if coarse else []
    with_targets = "asymmetric" in correction or "curvature" in correction or reconstruction is not None
    runner = open_runner(
        checkpoint,
        quant_formats,
        context,
        workspace=context.workspace,
        with_targets=with_targets,
        leave=quant_formats,  # `convert` rounds them
    )
    gradients = None
    if "curvature" in correction:
        gradients = Gradients(
            runner.executor, context.workspace.folder("gradients"), context.progress, tokens=settings.curvature_tokens
        )
    options = CastOptions(
        reconstruction,
        quant_formats,
        dtypes,
        "asymmetric" in correction,
        "alternating" in correction,
        gradients,
        overall,
    )
    result = runner.run(
        lambda block: cast_block(block, options),
        f"casting by {settings.method}",
        gradients.measure if gradients is not None else None,
        late_targets=options.asymmetric,
    )
    context.details["blocks"] = result.details
    return result.reader()


def cast_block(block: Block, options: CastOptions) -> dict[str, TensorExtras]:
    """Cast the linears of a block in place; return the codes by tensor name.

    In a run with targets and with ``options.asymmetric`` each matrix is fitted to the original's outputs on the original's
    inputs (GPTAQ, arXiv 2504.02692). Matrices that write to the residual stream also correct the error that the stream has
    already.

    ``block.details`` gets a row for each matrix (relative output error, seconds) and, with reconstruction, the block's error
    before and after.
    """
    tuned = options.reconstruction is not None and options.reconstruction.epochs > 0
    solver = CastSolver(block, options, tuned)
    measure = statistics_of if options.asymmetric else symmetric_statistics
    rounded = solve_block(block, measure(block, tuned=tuned), solver)
    if options.reconstruction is not None and tuned:
        _reconstruct(block, options.reconstruction, list(rounded.values()))
    return extras_by_tensor([(r.linear, r.keep, r.finish(options.dtypes[r.linear.tensor])) for r in rounded.values()])


def _reconstruct(block: Block, reconstruction: Reconstruction, rounded: list[Rounded | TrellisRounded]) -> None:
    """Train the scales of formats that have free ones, and the floats of the block."""
    parameters = dict(block.module.named_parameters())
    coded = {id(parameters[s.parameter]) for s in block.linears}
    free = [
        r for r in rounded if not r.quant_format.fixed_scales and id(parameters[r.linear.parameter]) not in block.frozen
    ]
    trainable = [TrainableTensor(r.scale, float(r.scale.abs().mean())) for r in free]
    trainable += trainable_floats(block, coded)

    def project() -> None:
        for r in free:
            r.project()

    derived = [
        ComputedParameter(parameters[r.linear.parameter], (r.scale,), partial(r.chain_gradients, parameters))
        for r in free
    ]
    block.details["tuning"] = reconstruct_block(block, reconstruction, trainable, project, derived)
