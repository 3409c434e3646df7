"""Proof that an inferred record says what may be removed, on a small copy of the model's config.

A pico model of the same class and kinds of blocks gets random weights. Units are removed from it as the pass would remove
them, and stock transformers must compute what the copy computes with those units zeroed, or with those blocks skipped: at
once and, for models that generate, token by token through the cache. Written records are proved by tests.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.architectures import resize
from compress.architectures.inference.skeleton import config_key, skeleton_of
from compress.architectures.model_map import model_map
from compress.errors import CheckpointError, CompressError, PassError, is_lack
from compress.passes.prune_structured import slicing, widths
from compress.passes.prune_structured.settings import PruneStructuredSettings
from compress.spec.spec import Spec, Structure

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.values import Checkpoint, Value

#: Largest difference, relative to the larger of 1 and the largest output: sums are rounded in another order.
_TOLERANCE = 1e-4
_TOKENS, _PROMPT = 16, 6
#: Numbers of heads that are tried where a class does not take the one asked for.
_TRIES = 16
_INSTEAD = {
    "layers": "remove `mlp` or `heads` instead, or write a record: docs/extend/family.md",
    "mlp": "remove `layers` instead, or write a record: docs/extend/family.md",
    "heads": "remove `mlp` or `layers` instead, or write a record: docs/extend/family.md",
}


def require_equivalent(spec: Spec, planned: Spec, settings: PruneStructuredSettings) -> None:
    """Raises `PassError` where the record is no written one, and removing units changes more than zeroing them.

    The class must also take the config of the result ``planned``.

    It takes a second or two, and is done once for a config.
    """
    record = model_map(spec).record
    if record.source == "written":
        return
    if unproved := next(
        (k for k in ("kv_heads", "keep_kv_heads", "experts", "hidden") if getattr(settings, k) is not None), None
    ):
        raise PassError(
            f"`{unproved}` needs a written record, and {record.model_type} has none",
            key=unproved,
            fix="remove `mlp` or `layers` instead, or write a record: docs/extend/family.md",
        )
    if settings.active_experts is not None and settings.compensation != "none" and record.expert_sum_key is None:
        raise PassError(
            f"the config of {record.model_type} does not say whether the weights of a token's experts are divided by their "
            "sum, so what fewer of them lose is not known",
            key="active_experts",
            fix="set `compensation: none`, or write a record: docs/extend/family.md",
        )
    kinds = [kind for kind in _INSTEAD if getattr(settings, kind) is not None or settings.searched]
    for kind in kinds:
        whole = kind == "heads" and (settings.heads is None or _whole_groups(spec, settings.heads))
        if reason := _reason(
            (config_key(spec.structure), kind, whole, settings.allocation, record.mlps, record.attention),
            _Anything((spec.structure, record.mlps, record.attention)),
        ):
            raise PassError(
                f"{record.model_type} cannot lose `{kind}` by its inferred record: {reason}",
                key=kind,
                fix=_INSTEAD[kind],
            )

    if settings.heads is not None:
        _require_number(spec, planned)
    if isinstance(settings.layers, tuple):
        _require_kinds(spec, planned)


def _require_number(spec: Spec, planned: Spec) -> None:
    """Raises `PassError` where the class takes no config with the number of heads that is left, with one that it takes."""
    if skeleton_of(planned.structure)[0] is not None:
        return
    mapped = model_map(spec)
    queries, record = mapped.heads, mapped.record
    left = int(record.value(planned.structure.config, record.heads_key))
    fits = None
    for count in sorted(range(1, queries), key=lambda n: abs(queries - left - n))[:_TRIES]:
        with suppress(PassError):
            smaller = widths.widths(spec, PruneStructuredSettings(heads=count, compensation="none"))
            if skeleton_of(replace(planned.structure, config=smaller.config))[0] is not None:
                fits = count
                break
    raise PassError(
        f"{record.model_type} takes no config with {left} of {queries} heads",
        key="heads",
        fix=f"set `heads: {fits}`" if fits else "remove `mlp` or `layers` instead",
    )


def _require_kinds(spec: Spec, planned: Spec) -> None:
    """Raises `PassError` where the last block of a kind goes, and the class does not run without that kind."""
    record, before, after = model_map(spec).record, spec.structure.config, planned.structure.config
    lists = record.per_layer_values(before), record.per_layer_values(after)
    gone = any({*map(str, values)} - {*map(str, lists[1].get(key, []))} for key, values in lists[0].items())
    gone |= any(record.value(before, key) and not record.value(after, key) for key in getattr(record, "numbers", ()))
    if gone and (problem := _problem(config_key(planned.structure), _Anything(planned.structure))):
        raise PassError(
            f"{record.model_type} does not run without the last block of a kind: {problem}",
            key="layers",
            fix="keep one of each kind: name other blocks in `layers`",
        )


def _whole_groups(spec: Spec, amount: float | int) -> bool:
    """Whether `heads` removes heads of keys and values with their queries."""
    mapped = model_map(spec)
    count = amount if isinstance(amount, int) else round(amount * mapped.heads)
    return mapped.heads == mapped.kv_heads or count % mapped.kv_heads != 0


class _Anything:
    """A value that all caches take for the same: the key beside it tells them apart."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Anything)


@dataclass(frozen=True)
class _Copy:
    """A pico model of the same config on disk; ``home`` removes it from there."""

    checkpoint: Checkpoint
    inputs: dict[str, Any]
    home: tempfile.TemporaryDirectory[str]


@lru_cache(maxsize=64)
def _reason(key: tuple[Any, ...], about: _Anything) -> str | None:
    """Why a kind of unit cannot be removed, in words; None where removing equals zeroing."""
    structure, mlps, attention = about.value
    _, kind, whole, allocation, *_ = key
    try:
        copy = _copy(config_key(structure), _Anything(structure))
        record = model_map(copy.checkpoint.spec).record
        if (kind == "mlp" and not {*mlps} <= {*record.mlps}) or (kind == "heads" and attention != record.attention):
            return "a small copy of its config has other parts"
        if kind == "layers":
            return _without_blocks(copy)
        return _without_units(copy, kind, whole, allocation)
    except CompressError as error:
        return f"on a small copy of its config: {error.what}"
    except Exception as error:
        if is_lack(error):
            raise
        return f"its class cannot be built or run on a small copy of its config ({type(error).__name__})"


@lru_cache(maxsize=64)
def _problem(key: str, about: _Anything) -> str | None:
    """Why a small copy of a config does not run, in words; None where it does."""
    try:
        _copy(key, about)
    except CompressError as error:
        return f"on a small copy of its config: {error.what}"
    except Exception as error:
        if is_lack(error):
            raise
        return f"its class cannot be built or run on a small copy of its config ({type(error).__name__})"
    return None


@lru_cache(maxsize=4)
def _copy(key: str, about: _Anything) -> _Copy:
    from compress.checkpoint.open import open_checkpoint
    from compress.models.classes import quiet_transformers
    from compress.models.pico import dummy_inputs, pico_model
    from compress.models.shrink import shrunken

    structure: Structure = about.value
    skeleton, reason = skeleton_of(structure)
    if skeleton is None:
        raise PassError(reason)
    model = pico_model(type(skeleton.model), shrunken(skeleton.config))
    home = tempfile.TemporaryDirectory(prefix="compress-pico-")
    with quiet_transformers():
        model.save_pretrained(home.name)
    return _Copy(open_checkpoint(Path(home.name)), dummy_inputs(model, _TOKENS), home)


def _without_blocks(copy: _Copy) -> str | None:
    """Compare the copy without each of its blocks with the copy in which that block passes its input on.

    A class may run no model without the only block of a kind, such as the one with attention, and have a first block that is
    unlike the others. Then the others are compared.
    """
    mapped = model_map(copy.checkpoint.spec)
    kinds = [frozenset(block.tensors) for block in mapped.blocks if not mapped.record.in_stack(f"{block.path}x")]
    compared = 0
    for index in range(mapped.depth):
        try:
            difference = _without_block(copy, index)
        except CheckpointError:
            continue  # the class has no place for the blocks that stay: the plan refuses to remove that one
        except CompressError:
            raise
        except Exception as error:
            if is_lack(error) or kinds.count(kinds[index]) > 1:
                raise
            continue
        if difference:
            return f"without block {index} a small copy of its config {difference} those with that block skipped"
        compared += 1
    return None if compared else "a small copy of its config runs without none of its blocks"


def _without_block(copy: _Copy, index: int) -> str | None:
    from compress.models.blocks import find_blocks

    twin = _load(copy.checkpoint)
    blocks = find_blocks(twin, model_map(copy.checkpoint.spec).record)
    blocks[index].forward = _passing(blocks[index].forward)
    return _difference(_load(slicing.drop_blocks(copy.checkpoint, [index])), twin, copy.inputs)


def _passing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A block's forward that returns the hidden states it was given; caches are filled as before."""
    import inspect

    first = next(iter(inspect.signature(forward).parameters))

    def passing(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        hidden = args[0] if args else kwargs[first]
        if isinstance(output, (tuple, list)):
            return type(output)((hidden, *output[1:]))
        return hidden

    return passing


def _without_units(copy: _Copy, kind: str, whole: bool, allocation: str) -> str | None:
    """Compare the copy without some neurons or heads with the copy in which these are zero."""
    import torch

    from compress.solvers.obs import keep_by_score

    planned = _amounts(copy.checkpoint.spec, kind, whole, allocation)
    generator = torch.Generator().manual_seed(0)
    chosen = []
    for units in planned.remove.values():
        for one, remove in units:
            score = torch.rand(one.count, generator=generator)
            chosen.append((one, keep_by_score(score, remove, runs=one.groups)))
    if not chosen:
        return f"a small copy of its config has no {kind}"
    try:
        smaller = _load(slicing.narrow(copy.checkpoint, chosen, planned))
    except CheckpointError as error:
        if kind != "heads":
            raise
        problem = error.what.removeprefix("config and weights disagree: ")
        return f"its class takes no other number of heads (on a small copy of its config, {problem})"
    twin = _load(_zeroed(copy.checkpoint, chosen))
    if difference := _difference(smaller, twin, copy.inputs):
        return f"without some of them a small copy of its config {difference} those with them zeroed"
    if not _difference(_load(copy.checkpoint), twin, copy.inputs):
        return "on a small copy of its config they change no output"
    return None


def _amounts(spec: Spec, kind: str, whole: bool, allocation: str) -> widths.Widths:
    """A share of the copy's neurons, or one head of each group, or half of the groups."""
    mapped = model_map(spec)
    record, queries, groups = mapped.record, 0, 0
    if kind == "mlp":
        others: dict[str, Any] = {"importance": "magnitude"} if allocation == "uniform" else {"allocation": allocation}
        settings = PruneStructuredSettings(mlp=0.25, compensation="none", multiple_of=1, **others)
        return widths.widths(spec, settings)
    queries, groups = mapped.heads, mapped.kv_heads
    if record.attention is None:
        raise PassError("its attention is not known")
    gone = groups // 2 if whole else 0
    each = max(1, queries // groups // 2)  # classes may want a number that divides the hidden size
    fewer = gone * (queries // groups) if whole else groups * each
    config = resize.with_heads(record, mapped.config, queries - fewer, groups - gone, "heads")
    units = resize.head_units(spec, whole_groups=whole)
    return widths.Widths({i: [(one, gone or fewer) for one in all_] for i, all_ in units.items()}, {}, config)


def _zeroed(checkpoint: Checkpoint, kept: Sequence[resize.Kept]) -> Checkpoint:
    """The checkpoint with the entries of all other units zero, wherever they lie."""
    from compress.checkpoint.values import Derived, Value

    entries = resize.kept_entries(checkpoint.spec, kept)

    def read(name: str) -> Value:
        value = checkpoint.tensor(name)
        data = value.data
        for axis, keep in entries.get(name, {}).items():
            mask = data.new_zeros(data.shape[axis])
            mask[list(keep)] = 1
            data = data * mask.view([-1 if i == axis else 1 for i in range(data.ndim)])
        return Value(data, value.mask)

    return Derived(checkpoint, checkpoint.spec, read)


def _load(checkpoint: Checkpoint) -> Any:
    from compress.models.loading import load_checkpoint

    return load_checkpoint(checkpoint, dtype="float32")


def _difference(a: Any, b: Any, inputs: dict[str, Any]) -> str | None:
    """How outputs of two models differ, in words; None where they are equal."""
    for ways, one, other in zip(("", " token by token"), _outputs(a, inputs), _outputs(b, inputs), strict=True):
        if one is None and other is None:
            continue
        if one is None or other is None or one.shape != other.shape:
            return f"has outputs{ways} of another shape than"
        difference = float((one - other).abs().max())
        if not difference <= _TOLERANCE * max(1.0, float(other.abs().max())):
            return f"has outputs{ways} that differ by {difference:.2g} from"
    return None


def _outputs(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The first output; and logits of a prompt and of single tokens after it, None for models that have no cache."""
    import torch

    from compress.models.classes import cache_argument, quiet_transformers

    with torch.inference_mode(), quiet_transformers():
        output = model(**inputs)
        first: torch.Tensor = output.logits if hasattr(output, "logits") else output[0]
        name = cache_argument(model)
        if inputs.keys() != {"input_ids"} or name is None or not model.can_generate():
            return first, None
        ids, logits = inputs["input_ids"], []
        cached: dict[str, Any] = {}
        try:
            for piece in (ids[:, :_PROMPT], *torch.split(ids[:, _PROMPT:], 1, 1)):
                output = model(input_ids=piece, use_cache=True, **cached)
                if getattr(output, name, None) is None:
                    return first, None
                cached = {name: getattr(output, name)}
                logits.append(output.logits)
        except Exception as error:  # some classes cannot step by themselves, before or after
            if is_lack(error):
                raise
            return first, None
    return first, torch.cat(logits, 1)
