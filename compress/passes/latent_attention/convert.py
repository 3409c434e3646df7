"""Latent attention in a checkpoint: moments ▶ components ▶ ranks ▶ projections ▶ tuning. Imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from compress.architectures.conversions.latent import DEFAULT_TARGET, LatentShape, latent, query_rank, whole_cache
from compress.architectures.conversions.windows import SOURCES
from compress.architectures.model_map import model_map
from compress.blockwise.block import Block
from compress.blockwise.reconstruct import Reconstruction, reconstruct_block, trainable_floats
from compress.blockwise.results import TensorExtras
from compress.blockwise.targets import Teacher
from compress.checkpoint.values import Checkpoint, Derived, Value
from compress.errors import PassError
from compress.models.blocks import rotary_frequencies
from compress.passes.base import Context
from compress.passes.blockwise import open_runner
from compress.passes.latent_attention.moments import MomentFiles
from compress.passes.latent_attention.plan import budget, shape_of
from compress.passes.latent_attention.solve import components, latent_block, projections, stored
from compress.passes.latent_attention.speed import decode
from compress.passes.tokenizers import with_tokenizer_class
from compress.sensitivity.depth import divergence
from compress.solvers.latent import best_counts, best_split
from compress.workspace import Workspace

if TYPE_CHECKING:
    from compress.blockwise.runner import BlockRunner
    from compress.passes.latent_attention.settings import LatentAttentionSettings

#: Number of calibration samples, the last ones, on which splits between keys and values are compared.
_HELD_OUT = 16
#: Trials of a split on each side, and the share of the budget between two of them.
_TRIALS, _STEP = 3, 0.06
#: Key components go by so many where there are enough: kernels want heads of multiples of 8 numbers.
_MULTIPLE = 4


def convert(checkpoint: Checkpoint, settings: LatentAttentionSettings, context: Context) -> Checkpoint:
    """Convert, and tune block by block; the result reads its tensors from the workspace."""
    spec = checkpoint.spec
    attention = model_map(spec).record.attention
    assert attention is not None
    paths = model_map(spec).paths
    names = {paths[i] + f"{m}.weight" for i in paths for m in (attention.query, attention.key, attention.value)}
    runner = open_runner(checkpoint, names, context, workspace=context.workspace.folder("moments"), with_targets=False)
    moments = MomentFiles(context.workspace.folder("moments").folder("blocks-moments"), context.device)
    moments.measure(runner, (attention.key, attention.value), context.progress)
    conversion = Conversion(checkpoint, settings, context, moments, _rotary(runner))
    choice = context.workspace.cached("choice", conversion.choose)
    shape = LatentShape(2 * sum(choice["counts"]), choice["values"])
    if not context.processes.rank:
        conversion.solve(shape, choice["counts"], context.workspace.alone().folder("solved"))
    runner.processes.barrier()
    result = conversion.derived(shape, choice["counts"], context.workspace.folder("solved"))
    if not context.processes.rank:
        choice["decode"] = decode(checkpoint, result, context)
    context.details["latent"] = choice
    if settings.repair == "tune":
        result = _tuned(checkpoint, result, settings, context)
    return result


def _rotary(runner: BlockRunner) -> tuple[list[float], float]:
    rotary = rotary_frequencies(runner.streamed.model)
    if rotary is None:
        raise PassError("this model has no rotary positions")
    return rotary


@dataclass(frozen=True)
class Conversion:
    """The conversion of one checkpoint.

    Attributes:
        moments: of its blocks. rotary: angles per position of its frequencies, and the factor of cosines and sines.
    """

    checkpoint: Checkpoint
    settings: LatentAttentionSettings
    context: Context
    moments: MomentFiles
    rotary: tuple[list[float], float]

    @cached_property
    def losses(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses of key components [F, G] and of value components [V] that are left out, summed over blocks, nats a token."""
        keys, values = [], []
        for index in model_map(self.checkpoint.spec).paths:
            parts = components(projections(self.checkpoint, index, self.context.device), self.moments.of(index))
            keys.append(parts.keys.losses)
            values.append(parts.values.losses)
        return torch.stack(keys).sum(0) / 2, torch.stack(values).sum(0) / 2

    def choose(self) -> dict[str, Any] | None:
        """Key components of each frequency and number of value components; None in other processes than the first."""
        if self.context.processes.rank:
            return None
        (keys, values), whole = self.losses, whole_cache(self.checkpoint.spec)
        tried: list[dict[str, Any]] = []
        if self.settings.max_cache is None:
            shape = shape_of(self.checkpoint.spec, self.settings)
        else:
            total = budget(self.checkpoint.spec, self.settings)
            step = _MULTIPLE if keys.numel() >= 8 * _MULTIPLE else 1
            start = best_split(keys, values, total, step)
            shape, tried = self._best(total, start, max(step, round(_STEP * total / 2 / step) * step))
        counts = best_counts(keys, shape.keys // 2)
        chosen = torch.zeros_like(keys, dtype=torch.bool)
        for f, count in enumerate(counts):
            chosen[f, :count] = True
        return {
            "counts": counts,
            "keys": shape.keys,
            "values": shape.values,
            "cached": shape.cached,
            "cached_before": whole.keys + whole.values,
            "expected": {"keys": float(keys[~chosen].sum()), "values": float(values[shape.values :].sum())},
            "tried": tried,
        }

    def _best(self, total: int, start: int, step: int) -> tuple[LatentShape, list[dict[str, Any]]]:
        """The split of least divergence near the expected one, and a row for each that was tried."""
        whole = whole_cache(self.checkpoint.spec)
        rows: dict[int, dict[str, Any]] = {}

        def loss(count: int) -> float:
            shape = LatentShape(2 * count, min(total - 2 * count, whole.values))
            if shape.values < 1 or shape.keys < 2 or shape.keys > whole.keys:
                return float("inf")
            if count not in rows:
                measured = self._divergence(shape)
                rows[count] = {"keys": shape.keys, "values": shape.values, "divergence": measured}
            return float(rows[count]["divergence"])

        best = start
        for way in (-step, step):
            for _ in range(_TRIALS):
                if loss(best + way) >= loss(best):
                    break
                best += way
        row = rows[best]
        return LatentShape(row["keys"], row["values"]), sorted(rows.values(), key=lambda row: int(row["keys"]))

    def _divergence(self, shape: LatentShape) -> float:
        """KL divergence per token of the converted model's predictions from the original's, on held-out samples."""
        data = self.context.data("calibration")
        counts = best_counts(self.losses[0], shape.keys // 2)
        trial = self.context.workspace.alone().folder(f"trial-{shape.keys}")  # a killed run finds its own tensors alone
        self.solve(shape, counts, trial)
        result = divergence(
            self.checkpoint,
            self.derived(shape, counts, trial),
            data.last(min(_HELD_OUT, len(data.ids))),
            dtype=self.context.dtype,
            device=self.context.device,
            work=self.context.workspace.path,
        )
        trial.remove()
        return result

    def solve(self, shape: LatentShape, counts: Sequence[int], workspace: Workspace) -> None:
        """Write the tensors of each block's attention; those that an earlier run wrote stay."""
        spec = self.checkpoint.spec
        mapped, split = model_map(spec), query_rank(spec) is not None
        for block in mapped.blocks:
            if workspace.tensors(f"{block.index:05}").exists():
                continue
            own, moments = projections(self.checkpoint, block.index, self.context.device), self.moments.of(block.index)
            parts = components(own, moments)
            tensors = latent_block(own, parts, moments, counts, shape.values, split)
            dtype = block.tensors["self_attn.o_proj.weight"].dtype
            workspace.save_tensors(f"{block.index:05}", stored(tensors, dtype))

    def derived(self, shape: LatentShape, counts: Sequence[int], workspace: Workspace) -> Checkpoint:
        """The converted checkpoint, which reads what `solve` wrote."""
        spec = self.checkpoint.spec
        frequencies = [angle for angle, count in zip(self.rotary[0], counts, strict=True) for _ in range(count)]
        after, new = latent(spec, shape, self.settings.target or DEFAULT_TARGET, frequencies, self.rotary[1])
        mapped = model_map(spec)

        def read(name: str) -> Value:
            if name not in new:
                return self.checkpoint.tensor(name)
            path, index = mapped.path_of(name), mapped.block_of(name)
            assert path is not None
            assert index is not None
            with safe_open(workspace.tensors(f"{index:05}"), framework="pt") as file:
                return Value(file.get_tensor(name.removeprefix(f"{path}self_attn.")))

        result = Derived(self.checkpoint, after, read)
        tokenizer = SOURCES[spec.structure.model_type].tokenizer_class or "PreTrainedTokenizerFast"
        result.rewritten = {**self.checkpoint.rewritten, **with_tokenizer_class(self.checkpoint, tokenizer)}
        return result


#: Norms and biases that hold the constant channel, which training must leave.
_FIXED = ("kv_a_layernorm.weight", "kv_a_proj_with_mqa.bias", "q_a_layernorm.weight", "q_a_proj.bias")


def _tuned(
    original: Checkpoint, converted: Checkpoint, settings: LatentAttentionSettings, context: Context
) -> Checkpoint:
    """Train each block towards the original's output, on the outputs of the trained blocks before it."""
    mapped = model_map(converted.spec)
    names = {x.name for x in mapped.layers if len(x.tensor.shape) == 2}
    runner = open_runner(
        converted,
        names,
        context,
        workspace=context.workspace.folder("tuning"),
        with_targets=True,
        teacher=Teacher(original, list(range(1, mapped.depth + 1))),
    )
    options = Reconstruction(settings.tune_epochs, settings.tune_rate)

    def tune(block: Block) -> dict[str, TensorExtras]:
        fixed = {id(p) for n, p in block.module.named_parameters() if n.endswith(_FIXED)}
        empty = [(x.weight, (x.weight == 0).all(1)) for x in block.linears]  # the constant channel reads nothing

        def project() -> None:
            for weight, rows in empty:
                weight[rows] = 0

        block.details["tuning"] = reconstruct_block(block, options, trainable_floats(block, fixed), project)
        return {}

    result = runner.run(tune, "tuning blocks")
    context.details["blocks"] = result.details
    return Derived(converted, converted.spec, result.reader())
