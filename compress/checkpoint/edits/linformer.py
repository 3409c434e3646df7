"""``linformer``: the attention ``module`` of an encoder projects keys and values from ``positions`` tokens to ``rank`` rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compress.architectures.model_map import model_map
from compress.checkpoint.edits.base import check_matrix, with_edits
from compress.checkpoint.edits.editing import ModelEdit
from compress.errors import CheckpointError, PassError
from compress.spec.edits import EditKind
from compress.spec.spec import DENSE, Edit, Spec

if TYPE_CHECKING:
    import torch

#: Names of the projections below the attention module.
PROJECTIONS = ("keys_projection", "values_projection")


class Linformer(EditKind):
    """Two matrices [rank, positions] beside an attention (Linformer, arXiv 2006.04768)."""

    kind = "linformer"
    keys = ("rank", "positions")
    storage = "factored"
    label = "attentions with projected keys and values"
    has_twin = False
    alone = ("projects its keys and values along the text", "leave `low_rank_attention` out")

    def check(self, edit: Edit, spec: Spec, where: str) -> None:
        """Check that the module is an attention, and the shapes of the projections."""
        if edit.module not in attentions(spec):
            raise CheckpointError(
                f"config and edits disagree: {edit.module} is no attention of an encoder", where=where
            )
        shape = (edit.values["rank"], edit.values["positions"])
        for part in PROJECTIONS:
            check_matrix(spec, f"{edit.module}.{part}", f"of {shape[0]} rows", lambda given: given == shape, where)

    def longest(self, edit: Edit) -> int:
        """The positions of its projections."""
        return int(edit.values["positions"])


def attentions(spec: Spec) -> dict[str, int]:
    """Attention module of each block, by its path in files ▶ number of its block.

    Raises:
        PassError: the model is no encoder of text with one list of blocks, or its attention cannot be projected.
    """
    mapped = model_map(spec)
    record = mapped.record
    if not mapped.known:
        raise PassError(f"{spec.structure.model_type} has no record, so its attention is not known")
    if record.causal or spec.structure.config.get("is_decoder"):
        raise PassError(
            f"{record.model_type} is no encoder: later keys are not there when a token is generated",
            fix="use `local_attention`",
        )
    if record.input != "input_ids" or record.stacks or record.attention is None:
        raise PassError(f"{record.model_type} is no encoder of text with one list of blocks")
    module = record.attention.query.rpartition(".")[0]
    return {f"{block.path}{module}": block.index for block in mapped.blocks}


def projected_attention(spec: Spec, rank: int, positions: int, modules: Mapping[str, int]) -> Spec:
    """Spec with projections of keys and values for attention modules, by their paths in files ▶ number of the block."""
    record = model_map(spec).record
    assert record.attention is not None
    last = record.attention.query.rpartition(".")[2]
    edits, tensors = [], {}
    owners = {f"{module}.{last}.weight": module for module in modules}
    for name, tensor in spec.tensors.items():
        tensors[name] = tensor
        if (module := owners.get(name)) is not None:
            edits.append(Edit("linformer", module, {"rank": rank, "positions": positions}))
            for part in PROJECTIONS:
                new = f"{module}.{part}"
                tensors[new] = replace(tensor, name=new, shape=(rank, positions), kept=None, storage=DENSE)
    return with_edits(spec, edits, tensors)


# ---- editing: copied into the modelling file of compact checkpoints ----

#: Name of the attention function in transformers' table.
LINFORMER = "compress_linformer"


class LinformerModel(ModelEdit):
    """Adds projections to an attention module, and the attention function that reads them."""

    kind = "linformer"

    def apply(self, model: Any, path: str, values: dict[str, Any]) -> None:
        """Add two matrices, in the dtype and on the device of the module's weights; they begin as means of neighbours."""
        import copy

        import torch
        from transformers import AttentionInterface

        AttentionInterface.register(LINFORMER, linformer_attention)
        module = model.get_submodule(path)
        weight = next(module.parameters())
        means = neighbour_means(int(values["rank"]), int(values["positions"]))
        for part in ("keys_projection", "values_projection"):
            setattr(module, part, torch.nn.Parameter(means.to(weight.dtype).to(weight.device)))
        module.config = copy.copy(module.config)  # its own: other modules attend as they did
        module.config._attn_implementation = LINFORMER

    def expand(self, state: dict[str, torch.Tensor], path: str, values: dict[str, Any]) -> None:
        """Raise ValueError: there is no dense twin."""
        raise ValueError(f"{path} projects its keys along the text, which no stock class can express")


def neighbour_means(rank: int, positions: int) -> torch.Tensor:
    """Projection [rank, positions] of which each row is the mean of neighbouring positions, about positions / rank of them."""
    import torch

    rows = torch.arange(positions) * rank // positions
    means = torch.zeros(rank, positions)
    means[rows, torch.arange(positions)] = 1.0
    return means / means.sum(1, keepdim=True).clamp(min=1)


def text_of(mask: Any, tokens: int) -> Any:
    """Which tokens are text, bool [B, tokens], from the mask of an encoder's attention; None for all.

    Raises:
        ValueError: the mask hides more than padding.
    """
    import torch

    if mask is None:
        return None
    seen = mask if mask.dtype == torch.bool or mask.ndim == 2 else mask > torch.finfo(mask.dtype).min / 2
    if seen.ndim == 4:
        if not (seen == seen[:, :1, :1]).all():
            raise ValueError("projected keys need a mask of padding alone")
        seen = seen[:, 0, 0]
    seen = seen[:, :tokens].bool()
    return None if seen.all() else seen


def projections(module: Any, text: Any, tokens: int) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Projections of keys and values for a batch, and which of their rows are in use.

    A text of L tokens is stretched over the P positions: its token p takes the column at ⌊(p + ½) P / L⌋, times P / L. So
    padding changes nothing, and all rows are in use. A text of no more tokens than rows keeps its keys and values.

    Args:
        text: which tokens are text, bool [B, N]; None for all N = ``tokens``.

    Returns:
        Two matrices [B or 1, rank, N], and bool [B or 1, 1, 1, rank] or None for all rows.
    """
    import torch

    keys, values = module.keys_projection, module.values_projection
    rank, positions = keys.shape
    if text is None:
        text = torch.ones(1, tokens, dtype=torch.bool, device=keys.device)
    lengths = text.sum(1)
    if int(lengths.max()) > positions:
        raise ValueError(
            f"a text of {int(lengths.max())} tokens is beyond the {positions} positions of its projections"
        )
    places = (text.cumsum(1) - 1).clamp(min=0)
    sizes = lengths[:, None].clamp(min=1)
    columns = ((2 * places + 1) * positions).div(2 * sizes, rounding_mode="floor").clamp(max=positions - 1)
    short = (lengths <= rank)[:, None, None]
    own = torch.nn.functional.one_hot(places, tokens)[..., :rank]  # of short texts all
    if own.shape[-1] < rank:
        own = torch.nn.functional.pad(own, (0, rank - own.shape[-1]))
    own = own.transpose(1, 2).to(keys.dtype)
    scale = (positions / sizes).to(keys.dtype)[:, None]
    both = (
        torch.where(short, own, each[:, columns].transpose(0, 1) * scale) * text[:, None] for each in (keys, values)
    )
    used = None
    if bool(short.any()):
        used = (~short | (torch.arange(rank, device=keys.device) < lengths[:, None, None]))[:, None]
    return (*both, used)


def linformer_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over projected keys and values, as transformers calls it; [B, N, heads, d].

    Args:
        query, key, value: [B, heads, N, d]. attention_mask: of padding. scaling: of the scores; None for 1 / √d.
    """
    import torch

    tokens = key.shape[2]
    of_keys, of_values, used = projections(module, text_of(attention_mask, tokens), tokens)
    keys, values = of_keys[:, None] @ key, of_values[:, None] @ value
    outputs = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=used, dropout_p=dropout, scale=scaling
    )
    return outputs.transpose(1, 2).contiguous(), None
