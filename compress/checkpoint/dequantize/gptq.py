"""``gptq`` checkpoints of AutoGPTQ, GPTQModel and optimum: integers of 2, 3, 4 or 8 bits, packed into 32-bit words.

``qweight`` [I · bits / 32, O] packs codes along inputs, ``qzeros`` [G, O · bits / 32] zero points along outputs, lowest bit
first and without gaps. ``scales`` are [G, O]. ``g_idx`` [I] has the group of each input, in any order with ``desc_act``.
A value is (q - z) · s in the dtype of the scales. Format 1 (``gptq``) stores z - 1, format 2 (``gptq_v2``) stores z.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from compress.checkpoint.dequantize.base import Parts, Scheme, WeightFiles, check_finite, fill
from compress.checkpoint.storage.bits import unpack_codes, words
from compress.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_BITS = (2, 3, 4, 8)
FLOATS = ("F16", "BF16", "F32")


class GptqScheme(Scheme):
    """Integer codes with zero points and the order of GPTQ."""

    methods = ("gptq",)
    marks = (".qweight", ".qzeros", ".scales", ".g_idx")

    def find(self, files: WeightFiles) -> None:
        """A tensor [O, I] for each ``qweight``."""
        bits, group, offset = _variant(files)
        said = f"gptq int{bits} in groups of {group}" if group else f"gptq int{bits} by channel"
        for module, entry in files.named(".qweight"):
            name, keys = f"{module}.weight", {part: f"{module}.{part}" for part in ("qweight", "qzeros", "scales")}
            files.entry(keys["qweight"], name, ("I32",))
            if len(entry.shape) != 2 or entry.shape[0] * 32 % bits:
                raise CheckpointError(
                    f"array {keys['qweight']} has the shape {list(entry.shape)}, which holds no {bits}-bit codes",
                    where=files.where,
                )
            inputs, outputs = entry.shape[0] * 32 // bits, entry.shape[1]
            groups = -(-inputs // (group or inputs))
            files.entry(keys["scales"], name, FLOATS, [(groups, outputs)])
            files.entry(keys["qzeros"], name, ("I32",), [(groups, words(outputs, bits))])
            if f"{module}.g_idx" in files.entries:
                keys["g_idx"] = f"{module}.g_idx"
                files.entry(keys["g_idx"], name, ("I32", "I64"), [(inputs,)])
            elif files.quantization.get("desc_act") and groups > 1:
                raise CheckpointError(
                    f"has {name} in the order of its activations (desc_act), but not {module}.g_idx", where=files.where
                )
            decode = partial(dequantize, bits=bits, group=group or inputs, offset=offset)
            files.add(name, (outputs, inputs), said, keys, decode)


def _variant(files: WeightFiles) -> tuple[int, int, int]:
    """Bits, inputs per group (0: all of a row), and what is added to stored zero points."""
    said: Any = files.quantization
    if type(said.get("bits")) is not int or said["bits"] not in _BITS:
        raise files.unknown("bits", said.get("bits"), "2, 3, 4 and 8")
    group = said.get("group_size", 128)
    if type(group) is not int or group == 0 or group < -1:
        raise files.unknown("group_size", group, "a number of inputs, or -1 for a row")
    layout = str(said.get("checkpoint_format") or said.get("format") or "gptq").lower()  # the order of transformers
    if layout not in ("gptq", "gptq_v2") or said.get("is_marlin_format"):
        raise files.unknown("checkpoint_format", "marlin" if layout == "gptq" else layout, "gptq and gptq_v2")
    if said.get("pack_dtype", "int32") not in ("int32", None):
        raise files.unknown("pack_dtype", said["pack_dtype"], "int32")
    dynamic = said.get("dynamic") or {}  # layers of other bits, or with a minus of none
    if not isinstance(dynamic, dict) or any(not str(key).startswith("-") for key in dynamic):
        raise files.unknown("dynamic", dynamic, "one number of bits for all layers")
    return said["bits"], max(group, 0), int(layout == "gptq")


def dequantize(arrays: Parts, dtype: torch.dtype, bits: int, group: int, offset: int) -> torch.Tensor:
    """Values [O, I]. ``offset``: 1 where zero points are stored less one, modulo their range."""
    import torch

    scale = arrays["scales"]
    check_finite(scale)
    groups, outputs = scale.shape
    inputs, half = arrays["qweight"].shape[0] * 32 // bits, 1 << (bits - 1)
    zero = (unpack_codes(arrays["qzeros"], bits, outputs).int() + half + offset) & (2 * half - 1)
    place = arrays["g_idx"].long() if "g_idx" in arrays else torch.arange(inputs) // group
    if int(place.min()) < 0 or int(place.max()) >= groups:
        raise ValueError(f"its g_idx names group {int(place.max())}, and there are {groups}: the checkpoint is damaged")

    def values(rows: slice) -> torch.Tensor:
        packed = arrays["qweight"][:, rows].T.contiguous()
        codes = unpack_codes(packed, bits, inputs).float() + half
        codes -= zero[:, rows].T.float()[:, place]
        return (codes * scale[:, rows].T.float()[:, place]).to(scale.dtype)

    return fill(torch.empty(outputs, inputs, dtype=dtype), values)
