"""Plan of the transforms: which tensors they change, and the spec that `cast` then rounds. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from compress.architectures import channels
from compress.architectures.channels import ChannelPlace, Channels, ResidualStream
from compress.architectures.model_map import model_map
from compress.errors import PassError
from compress.formatting import format_bytes
from compress.passes.cast.plan import takes_codes, untied
from compress.passes.cast.settings import CastSettings
from compress.passes.work import SampleSize, model_work
from compress.spec.spec import Spec, Tensor
from compress.work import Work

#: Passes over a weight that is rotated, of those that `Work` counts.
_ROTATING = 4.0


def transformed_spec(spec: Spec, settings: CastSettings) -> Spec:
    """The spec after the transforms: a rotated model with tied embeddings gets a head of its own.

    Raises:
        PassError: a transform would change the function of this model, or weights that it cannot change.
    """
    if "residual" in settings.rotations:
        alias = _alias(spec)
        spec = spec if alias is None else untied(spec, alias)
        _require_residual(spec, residual(spec))
    if "values" in settings.rotations:
        _require_places(spec, (p for each in values(spec) for p in each.places), "rotations", fills=True)
    if settings.smoothing is not None:
        smooth = smoothed_channels(spec, settings)
        _require_places(spec, (p for each in smooth for p in each.places), "smoothing", fills=False)
    return spec


def residual(spec: Spec) -> ResidualStream:
    """All that the rotation of the hidden states changes. Raises `PassError`."""
    with _key("rotations", "use `rotations: [values]`" if _has_values(spec) else "leave `rotations` out"):
        return channels.residual_stream(spec)


def values(spec: Spec) -> tuple[Channels, ...]:
    """The values of every key and value head. Raises `PassError`."""
    with _key("rotations", "leave `rotations` out"):
        result = channels.values(spec)
        if not result:
            raise PassError(f"{model_map(spec).record.model_type} has no values of single heads")
    return result


def smoothed_channels(spec: Spec, settings: CastSettings) -> tuple[Channels, ...]:
    """Channels that `smoothing` scales: those that a matrix reads whose inputs are rounded with it. Raises `PassError`."""
    with _key("smoothing", "leave `smoothing` out"):
        everything = (*channels.norms(spec), *channels.values(spec), *channels.neurons(spec))
    coded = takes_codes(spec, settings)
    return tuple(one for one in everything if any(f"{place.module}.weight" in coded for place in one.readers))


def work(spec: Spec, settings: CastSettings, calibration: SampleSize | None) -> Work | None:
    """The work of the transforms; None where calibration data are needed and their size is not known."""
    result = Work()
    if settings.smoothing is not None:
        if calibration is None:
            return None
        result.add_all(model_work(spec, calibration))
    changed = 0
    if "residual" in settings.rotations:
        changed += sum(tensor.count for tensor in spec.stored() if len(tensor.shape) == 2)
    if "values" in settings.rotations:
        changed += sum(spec.tensors[f"{place.module}.weight"].count for one in values(spec) for place in one.places)
    result.add("values", 0, 1, _ROTATING * changed)
    return result


def _has_values(spec: Spec) -> bool:
    with suppress(PassError):
        return bool(channels.values(spec))
    return False


def notes(spec: Spec, settings: CastSettings) -> list[str]:
    """A sentence on the head that `rotations: [residual]` unties."""
    alias = _alias(spec)
    if "residual" not in settings.rotations or alias is None:
        return []
    return [
        "`rotations: [residual]` folds the last norm into the head, which then shares no weights with the embeddings: "
        f"{format_bytes(alias.dense_bytes)} more; `rotations: [values]` keeps them tied"
    ]


def _alias(spec: Spec) -> Tensor | None:
    """The one of head and embeddings that is an alias of the other."""
    mapped = model_map(spec)
    table = None if mapped.embedding is None else spec.tensors[mapped.embedding]
    return next((t for t in (mapped.head_weight, table) if t is not None and t.alias_of is not None), None)


def _require_residual(spec: Spec, stream: ResidualStream) -> None:
    readers = [place.module for each in stream.norms for place in each.readers]
    names = [f"{module}.weight" for module in (*readers, *stream.writers)]
    _require(spec, (*names, stream.embedding), "rotations", fills=True)
    _require(spec, (f"{each.source.module}.weight" for each in stream.norms), "rotations", fills=False)


def _require_places(spec: Spec, places: Iterable[ChannelPlace], key: str, *, fills: bool) -> None:
    _require(spec, (f"{place.module}.weight" for place in places), key, fills=fills)


def _require(spec: Spec, names: Iterable[str], key: str, *, fills: bool) -> None:
    """Raise `PassError` for a tensor that a transform cannot change. ``fills``: whether removed weights would come back."""
    for name in names:
        tensor = spec.tensors.get(name)
        fix = f"leave `{key}` out"
        if tensor is None:
            raise PassError(f"the model has no tensor {name}, which `{key}` changes", key=key, fix=fix)
        if (why := _obstacle(tensor, fills)) is not None:
            raise PassError(f"{name} {why}", key=key, fix=fix)


def _obstacle(tensor: Tensor, fills: bool) -> str | None:
    if tensor.alias_of is not None:
        return f"shares its weights with {tensor.alias_of}, which others read"
    if tensor.quant_format is not None or not tensor.is_float:
        return "has codes already"
    return "has weights removed, which a rotation would fill in" if fills and tensor.kept is not None else None


@contextmanager
def _key(key: str, fix: str) -> Iterator[None]:
    """Within, errors name the setting and what to do."""
    try:
        yield
    except PassError as error:
        raise PassError(error.what, key=key, fix=fix) from None
