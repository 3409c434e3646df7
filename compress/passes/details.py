"""Details that passes write into the report: keys, and rows of each kind. `compress.report` reads them.

Keys and rows stay as they are in reports. A pass may add keys of its own; `SECTIONS` names those that have a section.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

from compress.blockwise.details import BlockDetails


class FormatDetails(TypedDict):
    """Format of one tensor, and the divergence expected from rounding it alone, nats per token."""

    tensor: str
    format: str
    divergence: float


class ShapeDetails(TypedDict):
    """One shape that was tried for a target. ``layers``: blocks that it removes. ``prefill``: time over the original's."""

    layers: list[int]
    heads: int
    mlp: int
    parameters: int
    bytes: int
    prefill: NotRequired[float]
    divergence: float
    chosen: bool


class ArrangementDetails(TypedDict):
    """One arrangement of blocks that share matrices, with its divergence from the original."""

    arrangement: str
    groups: list[list[int]]
    divergence: float


class SharingDetails(TypedDict):
    """Blocks that share matrices. ``tried``: all arrangements. ``tensors``: a row per shared matrix, with its error."""

    groups: list[list[int]]
    arrangement: str
    tried: list[ArrangementDetails]
    tensors: NotRequired[list[Any]]


class WindowDetails(TypedDict):
    """The window of one block, or of one of its KV heads. ``window``: tokens; None for everything.

    ``loss``: loss expected of a window there, in nats per token; ``share``: its share of the sum over all blocks.
    """

    block: int
    head: NotRequired[int]
    window: int | None
    loss: NotRequired[float]
    share: NotRequired[float]


class LatentDetails(TypedDict):
    """Numbers cached per token and block, and why.

    Attributes:
        counts: key components of each rotary frequency. keys, values: numbers cached for them. cached: with the constant one.
        cached_before: of the original. expected: divergence, nats per token, by second order.
        tried: splits of the numbers, with their measured divergence on held-out calibration samples.
        decode: a block's time for one token after so many cached ``tokens``, over the original's, in stock transformers.
    """

    counts: list[int]
    keys: int
    values: int
    cached: int
    cached_before: int
    expected: dict[str, float]
    tried: list[dict[str, Any]]
    decode: NotRequired[dict[str, float]]


class TrainingDetails(TypedDict):
    """A training. ``of``: unit of ``tokens``. ``held_out``, ``losses``: rows with ``step`` and ``loss``."""

    steps: int
    samples: int
    held_out_samples: int
    epochs: float
    of: NotRequired[str]
    tokens: int
    tokens_per_second: float
    rate: NotRequired[float]
    best_step: int
    helped: bool
    stopped: str | None
    held_out: list[dict[str, Any]]
    losses: list[dict[str, Any]]
    kept: NotRequired[list[str]]
    teacher_cache: NotRequired[dict[str, Any]]


#: A key that is not an identifier.
_CachedDetails = TypedDict("_CachedDetails", {"cached keys and values": Any, "quantised inputs": Any}, total=False)


class PassDetails(_CachedDetails, total=False):
    """All details of a pass.

    Attributes:
        blocks: a row per block of a block-wise run. experts: tokens by expert, if counted before that run.
        formats, curve: formats that a budget chose, and (bits, divergence) at other budgets.
        shapes: shapes tried for a target. widths: widths that a loss chose per block. sharing: shared blocks.
        training: the training of a student. allocation: sparsities or ranks by layer.
        removed_blocks, block_influence, loss_without_block, samples_without_block: depth; the last two by removal and block.
            loss_without_group, samples_without_group: by contiguous group, and for the blocks that greedy removal takes.
        hidden_channels: channels that are kept.
        windows: a row per block of a model with local attention. latent: numbers cached by latent attention.
        expert_saliency, kept_experts: by block. active_experts: experts of a token before and after; router_mass_kept: by
            block, the share of the router's weights that they have. kv_cache: static scales of a cache. groups: matrices whose
            groups are not of the default size. left: matrices that keep their format. transforms: of the dense weights.
    """

    blocks: list[BlockDetails]
    experts: list[BlockDetails]
    formats: list[FormatDetails]
    curve: list[tuple[float, float]]
    shapes: list[ShapeDetails]
    widths: Any
    sharing: SharingDetails
    training: TrainingDetails
    allocation: Any
    removed_blocks: list[int]
    loss_without_block: list[dict[str, float]]
    samples_without_block: list[dict[str, int]]
    loss_without_group: dict[str, float]
    samples_without_group: dict[str, int]
    block_influence: list[float]
    expert_saliency: dict[str, list[float]]
    kept_experts: dict[str, list[int]]
    active_experts: dict[str, int]
    router_mass_kept: dict[str, float]
    hidden_channels: int
    windows: list[WindowDetails]
    kv_cache: Any
    groups: str
    left: str
    transforms: str
    latent: LatentDetails


#: Keys that reports show in a section of their own; others are listed on one line.
SECTIONS = frozenset(
    {
        "blocks",
        "experts",
        "formats",
        "curve",
        "shapes",
        "sharing",
        "training",
        "widths",
        "windows",
        "latent",
        "loss_without_block",
        "samples_without_block",
    }
)
