"""Send each token to fewer experts, and make up for the router weights that are lost. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from compress.architectures.conversions.experts import shared_gates
from compress.architectures.model_map import model_map
from compress.blockwise.block import Block
from compress.blockwise.results import TensorExtras
from compress.checkpoint.values import Checkpoint, Derived, Value
from compress.errors import PassError
from compress.passes.base import Context
from compress.passes.blockwise import open_runner
from compress.passes.prune_structured import widths

if TYPE_CHECKING:
    from compress.passes.prune_structured.settings import PruneStructuredSettings


def fewer_active(checkpoint: Checkpoint, settings: PruneStructuredSettings, context: Context) -> Checkpoint:
    """The checkpoint with `active_experts`: the config's number, and down projections of experts that grow by block.

    They stay as they are where the weights of a token's experts are divided by their sum, and without compensation. Experts
    that `carve_experts` made are a sum, not a mean: there the larger weights of those that are left are undone.
    """
    if settings.active_experts is None:
        return checkpoint
    count = widths.active_experts(checkpoint.spec, settings.active_experts)
    context.details["active_experts"] = {"before": model_map(checkpoint.spec).experts_per_token, "after": count}
    spec = widths.with_active_experts(checkpoint.spec, count)
    shares: Mapping[str, float] = {}
    if settings.compensation != "none" and model_map(checkpoint.spec).expert_weights_sum_to_one:
        gates = shared_gates(checkpoint.spec)
        grown = model_map(checkpoint.spec).experts_per_token / count
        shares = {str(index): grown for index, name in gates.items() if not checkpoint.tensor(name).data.any()}
    elif settings.compensation != "none":
        shares = context.workspace.cached("router_mass", lambda: kept_mass(checkpoint, count, context))
        context.details["router_mass_kept"] = dict(shares)
    downs = {x.name: x.block for x in model_map(spec).layers if x.expert is not None and _reads_neurons(spec, x)}

    def read(name: str) -> Value:
        value = checkpoint.tensor(name)
        share = shares.get(str(downs[name])) if name in downs else None
        if share is None:
            return value
        return Value((value.data.double() / share).to(value.data.dtype), value.mask)

    return Derived(checkpoint, spec, read)


def _reads_neurons(spec: Any, linear: Any) -> bool:
    record = model_map(spec).record
    return record.starred(linear.part) in {mlp.down for mlp in record.mlps}


def kept_mass(checkpoint: Checkpoint, count: int, context: Context) -> dict[str, float]:
    """Number of each block with experts ▶ the share of its router's weights that a token's first ``count`` experts have.

    It is Σ over the first ``count`` / Σ over all experts that a token is sent to, a mean over calibration tokens.

    Raises:
        PassError: the model's experts are of an unknown kind.
    """
    names = {x.name for x in model_map(checkpoint.spec).layers if x.expert is not None}
    runner = open_runner(
        checkpoint, names, context, workspace=context.workspace.folder("router_mass"), with_targets=False
    )

    def measure(block: Block) -> dict[str, TensorExtras]:
        if not block.swaps:
            raise PassError(f"the experts of block {block.index} are of a kind that cannot be measured", key="experts")
        sums, mask = torch.zeros(2, dtype=torch.float64), None

        def watch(module: Any, args: tuple[Any, ...]) -> None:
            weights = args[2].double().flatten(0, -2).sort(-1, descending=True).values
            shares = weights[:, :count].sum(-1) / weights.sum(-1)
            shares = shares if mask is None else shares[mask.flatten()]
            sums[0] += float(shares.sum())
            sums[1] += len(shares)

        handle = block.swaps[0].experts.fused.register_forward_pre_hook(watch)
        try:
            with torch.no_grad():
                for rows in block.view.batches():
                    mask = block.token_mask(rows)
                    block.forward(rows, block.read_inputs(rows))
        finally:
            handle.remove()
        block.view.processes.all_reduce(sums)
        block.details["router_mass"] = float(sums[0] / sums[1])
        return {}

    rows = runner.run(measure, "measuring the router").details
    return {str(row["block"]): row["router_mass"] for row in rows if "router_mass" in row}
