"""Settings of an export to ONNX."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.settings import Settings


class OnnxSettings(Settings):
    """How products are computed."""

    accuracy_level: Literal[1, 4] = Field(
        default=1,
        description="1: products with codes are computed with floats, as transformers does. 4: their inputs are rounded to 8 "
        "bits, which is faster.",
    )
