"""Conversions between stock families: what one family's class cannot express, another family's class may. No torch here."""

from __future__ import annotations

from compress.architectures.conversions.albert import ALBERT
from compress.architectures.conversions.shared_blocks import SharedBlocks
from compress.spec.spec import Spec

__all__ = ["CONVERSIONS", "SharedBlocks", "shared_blocks"]

CONVERSIONS: tuple[SharedBlocks, ...] = (ALBERT,)


def shared_blocks(spec: Spec) -> SharedBlocks | None:
    """The conversion to a family whose blocks share all their tensors; None where no stock family computes the same."""
    return next((conversion for conversion in CONVERSIONS if conversion.takes(spec)), None)
