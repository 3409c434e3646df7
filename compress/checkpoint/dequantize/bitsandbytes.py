"""``bitsandbytes`` checkpoints: 4-bit codes of NF4 or FP4 in blocks, and int8 rows (LLM.int8).

A 4-bit value is map[code] · absmax of its block, the first code of a byte in its high half. ``quant_state`` is a JSON object in
an array of bytes: shape, block sizes, dtype. With double quantisation, absmax is itself nested_map[code] · nested_absmax +
offset. An int8 value is code · SCB / 127. All is computed in float32.
"""

from __future__ import annotations

import json
from functools import partial
from math import isfinite, prod
from typing import TYPE_CHECKING, Any

from compress.checkpoint.dequantize.base import Parts, Scheme, WeightFiles, check_finite, fill
from compress.errors import CheckpointError
from compress.spec.spec import DTYPE_BITS

if TYPE_CHECKING:
    import torch

_STATE = ".quant_state.bitsandbytes__"
#: Kinds of 4-bit codes ▶ name for users.
_KINDS = {"nf4": "NF4", "fp4": "FP4"}
#: 1 / 127 as the library rounds it.
_INT8 = 7.874015718698502e-3


class BitsAndBytesScheme(Scheme):
    """Codes of 4 bits with a quantisation state, and of 8 bits with a scale for each row."""

    methods = ("bitsandbytes",)
    unused = (".weight_format",)
    marks = (
        ".absmax",
        ".quant_map",
        ".nested_absmax",
        ".nested_quant_map",
        ".SCB",
        *(_STATE + kind for kind in _KINDS),
    )
    coded = ("I8", "U8")

    def find(self, files: WeightFiles) -> None:
        """A tensor for each quantisation state, and for each ``SCB``."""
        for kind in _KINDS:
            for name, _ in files.named(_STATE + kind):
                _four_bits(files, name, kind)
        for module, _ in files.named(".SCB"):
            name = f"{module}.weight"
            shape = files.entry(name, f"{module}.SCB", ("I8",)).shape
            if len(shape) != 2:
                raise CheckpointError(f"array {name} has the shape {list(shape)}, not two axes", where=files.where)
            files.entry(f"{module}.SCB", name, ("F32",), [(shape[0],)])
            form = files.entries.get(f"{module}.weight_format")
            if form is not None and any(files.read(f"{module}.weight_format")):
                raise CheckpointError(
                    f"stores {name} in a layout of a GPU (weight_format is not 0), which this version cannot read",
                    where=files.where,
                    fix="save it with a recent bitsandbytes, or start from the unquantised checkpoint",
                )
            files.add(name, shape, "bitsandbytes int8 by channel", {"codes": name, "scale": f"{module}.SCB"}, int8)


def _four_bits(files: WeightFiles, name: str, kind: str) -> None:
    """Add a tensor of 4-bit codes."""
    state = _state(files, f"{name}{_STATE}{kind}", kind)
    shape, block = tuple(state["shape"]), state["blocksize"]
    count = prod(shape)
    codes = files.entry(name, f"{name}{_STATE}{kind}", DTYPE_BITS)
    if codes.end - codes.start != -(-count // 2):
        raise CheckpointError(
            f"array {name} has {codes.end - codes.start} bytes, and {list(shape)} codes of 4 bits need {-(-count // 2)}",
            where=files.where,
        )
    keys = {"codes": name, "absmax": f"{name}.absmax", "map": f"{name}.quant_map"}
    blocks, nested = -(-count // block), state.get("nested_blocksize")
    files.entry(keys["absmax"], name, ("U8",) if nested else ("F32",), [(blocks,)])
    files.entry(keys["map"], name, ("F32",), [(16,)])
    if nested:
        keys |= {"nested": f"{name}.nested_absmax", "nested_map": f"{name}.nested_quant_map"}
        files.entry(keys["nested"], name, ("F32",), [(-(-blocks // nested),)])
        files.entry(keys["nested_map"], name, ("F32",), [(256,)])
    said = f"bitsandbytes {_KINDS[kind]} in blocks of {block}" + (", twice quantised" if nested else "")
    decode = partial(four_bits, shape=shape, block=block, nested=nested or 0, offset=state.get("nested_offset") or 0.0)
    files.add(name, shape, said, {**keys, "state": f"{name}{_STATE}{kind}"}, decode)


def _state(files: WeightFiles, key: str, kind: str) -> dict[str, Any]:
    """A quantisation state, checked. Raises `CheckpointError`."""
    files.entry(key, key, ("U8",))
    try:
        state = json.loads(files.read(key).decode())
        nested = state.get("nested_blocksize")
        sizes = [state["blocksize"], *state["shape"], *([nested] if nested is not None else [])]
        assert state["quant_type"] == kind
        assert all(type(n) is int and n > 0 for n in sizes)
        assert nested is None or isfinite(state["nested_offset"])
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError):
        raise CheckpointError(
            f"array {key} is no quantisation state of {kind}", where=files.where, fix="copy or download it again"
        ) from None
    return dict(state)


def four_bits(
    arrays: Parts, dtype: torch.dtype, shape: tuple[int, ...], block: int, nested: int, offset: float
) -> torch.Tensor:
    """Values of ``shape``. ``nested``: blocks per scale of the scales; 0 where these are floats."""
    import torch

    table, absmax = arrays["map"], arrays["absmax"]
    check_finite(table, "code values")
    if nested:
        check_finite(arrays["nested"])
        check_finite(arrays["nested_map"], "code values of scales")
        absmax = (
            arrays["nested_map"][absmax.long()] * arrays["nested"].repeat_interleave(nested)[: len(absmax)] + offset
        )
    check_finite(absmax)
    packed, count = arrays["codes"].flatten().view(torch.uint8), prod(shape)
    out = torch.empty(count, dtype=dtype)

    def values(places: slice) -> torch.Tensor:
        pairs = packed[places.start // 2 : -(-places.stop // 2)]
        codes = torch.stack((pairs >> 4, pairs & 15), 1).flatten()[: places.stop - places.start]
        scales = absmax[places.start // block : -(-places.stop // block)].repeat_interleave(block)
        return table[codes.long()] * scales[: len(codes)]

    return fill(out, values, 2 * block).reshape(shape)


def int8(arrays: Parts, dtype: torch.dtype) -> torch.Tensor:
    """Values [O, I] of int8 rows."""
    import torch

    check_finite(arrays["scale"])

    def values(rows: slice) -> torch.Tensor:
        return arrays["codes"][rows].float() * arrays["scale"][rows, None] * _INT8

    return fill(torch.empty(arrays["codes"].shape, dtype=dtype), values)
