"""Carve all blocks, and read the result as a Qwen2-MoE. Imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from compress.architectures.conversions.experts import carved
from compress.architectures.conversions.windows import SOURCES
from compress.architectures.model_map import model_map
from compress.blockwise.reconstruct import Reconstruction
from compress.checkpoint.values import Checkpoint, Derived, Value, torch_dtype
from compress.passes.base import Context
from compress.passes.blockwise import open_runner
from compress.passes.carve_experts.block import CarveOptions, carve_block
from compress.passes.carve_experts.plan import MLP, dense_blocks, expert_sizes
from compress.passes.tokenizers import with_tokenizer_class

if TYPE_CHECKING:
    from compress.passes.carve_experts.settings import CarveExpertsSettings


def convert(checkpoint: Checkpoint, settings: CarveExpertsSettings, context: Context) -> Checkpoint:
    """The checkpoint as a Qwen2-MoE, carved block by block. Its tensors are cut out when they are read."""
    sizes, dense = expert_sizes(checkpoint.spec, settings), dense_blocks(checkpoint.spec, settings)
    mapped, tuned = model_map(checkpoint.spec), settings.repair == "tune"
    names = {x.name for x in mapped.layers if len(x.tensor.shape) == 2 and (tuned or x.part in MLP)}
    names = {name for name in names if tuned or mapped.block_of(name) not in dense}
    results = context.workspace.folder("routers")
    options = CarveOptions(
        sizes,
        frozenset(dense),
        settings.repair != "none",
        Reconstruction(settings.tune_epochs, settings.tune_lr) if tuned else None,
        results,
    )
    runner = open_runner(checkpoint, names, context, workspace=context.workspace, with_targets=tuned)
    result = runner.run(lambda block: carve_block(block, options), "carving experts")
    context.details["blocks"] = result.details
    context.processes.barrier()
    changed = Derived(checkpoint, checkpoint.spec, result.reader())
    paths = {f"{block.path}mlp.": block.index for block in mapped.blocks if block.index not in dense}
    spec = carved(checkpoint.spec, sizes, dense)

    def read(name: str) -> Value:
        path, mlp, rest = name.partition("mlp.")
        if path + mlp not in paths:
            return changed.tensor(name)
        file = results.tensors(f"{paths[path + mlp]:05}")
        return Value(_part(changed, path + mlp, rest, file, sizes.active, torch_dtype(spec.tensors[name].dtype)))

    derived = Derived(checkpoint, spec, read)
    tokenizer_class = SOURCES[checkpoint.spec.structure.model_type].tokenizer_class
    derived.rewritten = {**derived.rewritten, **with_tokenizer_class(checkpoint, tokenizer_class)}
    return derived


def _part(changed: Checkpoint, path: str, rest: str, file: Path, active: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of a carved MLP, by its name below the MLP.

    Router weights add up to 1, and all chosen experts have nearly the same: down projections grow by their number. The shared
    expert's gate is zero, a half after the sigmoid: its down projection doubles.
    """
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        expert, router = tensors.get_tensor("expert"), tensors.get_tensor("router")
    if rest == "gate.weight":
        weights: torch.Tensor = router.to(dtype)
        return weights
    if rest == "shared_expert_gate.weight":
        return torch.zeros(1, router.shape[1], dtype=dtype)
    module, _, part = rest.removesuffix(".weight").rpartition(".")
    number = -1 if module == "shared_expert" else int(module.rpartition(".")[2])
    neurons = (expert == number).nonzero().flatten()
    data = changed.tensor(f"{path}{part}.weight").data
    if part != "down_proj":
        rows: torch.Tensor = data[neurons]
        return rows.to(dtype)
    down: torch.Tensor = data[:, neurons].double() * (2 if number < 0 else active)
    return down.to(dtype)
