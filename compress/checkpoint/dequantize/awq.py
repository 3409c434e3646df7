"""``awq`` checkpoints of AutoAWQ in the layout ``gemm``: integers of 4 bits, packed along outputs into 32-bit words.

``qweight`` is [I, O / 8], ``qzeros`` [G, O / 8], ``scales`` [G, O]. The eight codes of a word are those of outputs
0 2 4 6 1 3 5 7, lowest bits first. A value is (q - z) · s in the dtype of the scales.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from compress.checkpoint.dequantize.base import Parts, Scheme, WeightFiles, check_finite, fill
from compress.checkpoint.dequantize.gptq import FLOATS
from compress.checkpoint.storage.bits import unpack_codes
from compress.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_PACKED = 8
#: Layouts of codes that are not ``gemm``.
_OTHERS = frozenset({"gemv", "gemv_fast", "llm-awq"})
#: Place in a word of each of its eight outputs.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


class AwqScheme(Scheme):
    """Codes of 4 bits with zero points."""

    methods = ("awq",)
    marks = (".qweight", ".qzeros", ".scales")

    def find(self, files: WeightFiles) -> None:
        """A tensor [O, I] for each ``qweight``."""
        said = files.quantization
        if said.get("bits", said.get("w_bit", 4)) != 4:
            raise files.unknown("bits", said.get("bits", said.get("w_bit")), "4")
        for key in ("version", "format", "backend"):
            if (layout := str(said.get(key) or "gemm").lower()) in _OTHERS or (layout != "gemm" and key != "backend"):
                raise files.unknown(key, said[key], "gemm")
        group = said.get("group_size", said.get("q_group_size", 128))
        if type(group) is not int or group == 0 or group < -1:
            raise files.unknown("group_size", group, "a number of inputs, or -1 for a row")
        for module, entry in files.named(".qweight"):
            name, keys = f"{module}.weight", {part: f"{module}.{part}" for part in ("qweight", "qzeros", "scales")}
            files.entry(keys["qweight"], name, ("I32",))
            if len(entry.shape) != 2 or (group > 0 and entry.shape[0] % group):
                raise CheckpointError(
                    f"array {keys['qweight']} has the shape {list(entry.shape)}, which is not groups of {group} inputs",
                    where=files.where,
                )
            inputs, outputs = entry.shape[0], entry.shape[1] * _PACKED
            groups = inputs // group if group > 0 else 1
            files.entry(keys["scales"], name, FLOATS, [(groups, outputs)])
            files.entry(keys["qzeros"], name, ("I32",), [(groups, entry.shape[1])])
            size = f"in groups of {group}" if group > 0 else "by channel"
            files.add(name, (outputs, inputs), f"awq int4 {size}", keys, partial(dequantize, group=inputs // groups))


def dequantize(arrays: Parts, dtype: torch.dtype, group: int) -> torch.Tensor:
    """Values [O, I]. ``group``: inputs per scale."""
    import torch

    scale = arrays["scales"]
    check_finite(scale)
    inputs, outputs = arrays["qweight"].shape[0], scale.shape[1]
    out = torch.empty(outputs, inputs, dtype=dtype)

    def codes(packed: torch.Tensor) -> torch.Tensor:
        flat = unpack_codes(packed, 4, outputs).reshape(len(packed), -1, _PACKED)
        return flat[:, :, list(_PLACES)].reshape(len(packed), outputs).float()

    def values(rows: slice) -> torch.Tensor:
        groups = torch.arange(rows.start, rows.stop) // group
        difference = codes(arrays["qweight"][rows]) - codes(arrays["qzeros"])[groups]
        return (difference * scale.float()[groups]).to(scale.dtype)

    fill(out.T, values)
    return out
