"""Types of whole files such as Q4_K_M: most matrices have one type, and those that lose most a wider one.

The rules are those of ``llama_tensor_get_type`` in llama.cpp (src/llama-quant.cpp).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

#: Type of a file ▶ that of most matrices.
MIXTURES: Mapping[str, str] = {"Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K"}
#: Number of experts of the models whose attention is small beside them.
_EIGHT = 8


def mixed_type(mixture: str, name: str, blocks: int, experts: int, tied: bool) -> str:
    """The type of a matrix in a file of a mixture.

    Args:
        name: in the file. blocks, experts: of the model. tied: whether the table of embeddings is the head too.
    """
    most = MIXTURES[mixture]
    if not name.startswith("blk."):
        return most if name.startswith("token_embd") and not tied else "Q6_K"
    block, part = re.match(r"blk\.(\d+)\.(\w+)", name).groups()  # type: ignore[union-attr]
    wider = _is_wider(int(block), blocks) if mixture.endswith("_M") else False
    if experts == _EIGHT and part in ("attn_v", "attn_k"):
        return "Q8_0"
    if experts == _EIGHT and part == "attn_output" and most == "Q4_K":
        return "Q5_K"
    if part == "attn_qkv" and mixture.endswith("_M"):
        return {"Q4_K": "Q5_K", "Q5_K": "Q6_K"}[most]
    if part == "attn_v":
        return "Q6_K" if wider else "Q5_K" if mixture == "Q4_K_S" and int(block) < 4 else most
    if part.startswith("ffn_down"):
        return "Q6_K" if wider else "Q5_K" if mixture == "Q4_K_S" and int(block) < blocks // 8 else most
    return most


def _is_wider(block: int, blocks: int) -> bool:
    """The first and the last eighth of the blocks, and every third between."""
    return block < blocks // 8 or block >= 7 * blocks // 8 or (block - blocks // 8) % 3 == 2
