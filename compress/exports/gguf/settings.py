"""Settings of an export to GGUF."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from compress.settings import Settings


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) and value.lower() not in ("auto", "keep") else value


#: Types that matrices can be rounded to; those from Q2_K on by `libgguf`. The last four are of whole files (`mixtures`).
RoundedType = Literal[
    "F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL",
    "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M",
]  # fmt: skip
TableType = Literal["auto", "keep", "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_0", "Q4_0", "Q4_K"]


class GgufSettings(Settings):
    """Types of the tensors of a GGUF file."""

    type: Annotated[RoundedType | None, BeforeValidator(_upper)] = Field(
        default=None,
        description="Round the matrices of blocks to this type, such as Q4_K, or as llama.cpp's files of a type such as Q4_K_M "
        "do. By default they are kept as they are.",
    )
    embeddings: Annotated[TableType, BeforeValidator(_upper)] = Field(
        default="auto",
        description="Type of float tables of embeddings and of the head, such as Q8_0. `keep`: as they are. `auto`: Q8_0 "
        "where the matrices of blocks are quantised (for Q4_K_M and the like what llama.cpp takes), else `keep`.",
    )
    imatrix: str | None = Field(
        default=None,
        description="File with the mean squares of matrices' inputs (imatrix.gguf), which k- and i-quants weigh errors by.",
    )
