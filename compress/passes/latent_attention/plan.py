"""Plan of `latent_attention`: the numbers that are cached per token, and the spec of the result. No torch."""

from __future__ import annotations

from compress.architectures.conversions.latent import DEFAULT_TARGET, LatentShape, check_latent, latent, whole_cache
from compress.errors import PassError
from compress.passes.latent_attention.settings import LatentAttentionSettings
from compress.spec.spec import Spec

#: Share of the budget that keys are expected to get; trials decide.
_KEYS = 0.55

#: Blocks of which decoding is timed.
TIMED_BLOCKS = 2


def budget(spec: Spec, settings: LatentAttentionSettings) -> int:
    """Numbers per token and block that keys and values may have together, without the constant channel, with `max_cache`."""
    whole = whole_cache(spec)
    assert settings.max_cache is not None
    return int(settings.max_cache * (whole.keys + whole.values) + 1e-9) - 1


def shape_of(spec: Spec, settings: LatentAttentionSettings) -> LatentShape:
    """The numbers that are cached per token and block; with `max_cache` the split between keys and values is an estimate.

    Raises:
        PassError: they are more than the original caches, or too few.
    """
    whole = whole_cache(spec)
    if settings.max_cache is not None:
        total = budget(spec, settings)
        if total < 3:
            raise PassError(
                f"{settings.max_cache:.0%} of {whole.keys + whole.values} numbers per token leaves none for keys and values",
                key="max_cache",
            )
        keys = 2 * max(1, min(round(_KEYS * total / 2), whole.keys // 2, (total - 1) // 2))
        return LatentShape(keys, min(total - keys, whole.values))
    shape = LatentShape(settings.keys or whole.keys, settings.values or whole.values)
    for key, asked, most in (("keys", shape.keys, whole.keys), ("values", shape.values, whole.values)):
        if asked > most:
            raise PassError(f"its {key} have {most} numbers per token, and {asked} are asked for", key=key)
    return shape


def planned(spec: Spec, settings: LatentAttentionSettings) -> Spec:
    """The spec of the result. Frequencies in its config are placeholders: data decide which components are kept."""
    target = settings.target or DEFAULT_TARGET
    check_latent(spec, target)
    shape = shape_of(spec, settings)
    return latent(spec, shape, target, [1.0] * (shape.keys // 2))[0]
