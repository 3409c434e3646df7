"""Matrices of codes as arrays, and where an ONNX graph holds their values.

Shapes: O outputs, I inputs, G groups of inputs per row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from compress.spec.formats import BLOCK
from compress.spec.spec import Tensor

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint

Numbers = NDArray[Any]


@dataclass(frozen=True)
class CodedMatrix:
    """A quantised matrix: value = (code - zero) · scale, for each group of inputs.

    Attributes:
        name: of the tensor.
        bits: 4 for integers of 2 to 4 bits, 8 for those of 5 to 8 bits and fp8.
        codes: [O, I], int8, or E4M3 as uint8.
        scale: float32 [O, G]. zero: int8 [O, G]; None if symmetric.
        is_float: whether codes are E4M3.
    """

    name: str
    bits: int
    codes: Numbers
    scale: Numbers
    zero: Numbers | None = None
    is_float: bool = False

    @property
    def group(self) -> int:
        """Inputs per scale."""
        return int(self.codes.shape[1] // self.scale.shape[1])

    def values(self, rows: slice = slice(None)) -> Numbers:
        """Float32 values of some rows."""
        codes = self.codes[rows]
        if self.is_float:
            import torch

            numbers = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
        else:
            numbers = codes.astype(np.float32)
        grouped = numbers.reshape(*codes.shape[:1], self.scale.shape[1], -1)
        if self.zero is not None:
            grouped = grouped - self.zero[rows][..., None].astype(np.float32)
        return cast(Numbers, (grouped * self.scale[rows][..., None]).reshape(codes.shape))

    def with_group(self, group: int) -> CodedMatrix:
        """The same matrix with smaller groups, each scale and zero repeated."""
        times = self.group // group
        zero = None if self.zero is None else self.zero.repeat(times, axis=1)
        return CodedMatrix(self.name, self.bits, self.codes, self.scale.repeat(times, axis=1), zero, self.is_float)


def read_matrix(checkpoint: Checkpoint, tensor: Tensor) -> CodedMatrix | None:
    """The codes of a tensor; None for one without, and for kernels and experts, whose values ONNX holds as floats."""
    import torch

    quant_format = tensor.quant_format
    codes = None if quant_format is None else checkpoint.tensor(tensor.name).codes
    if quant_format is None or codes is None:
        return None
    stored = codes.codes.view(torch.uint8) if quant_format.format == "fp8" else codes.codes
    scale = codes.scale.float().reshape(-1, 1) if quant_format.whole else codes.scale.float()
    if quant_format.block:
        scale = scale.repeat_interleave(BLOCK, 0)[: stored.shape[0]]
    scale = scale.expand(stored.shape[0], -1).contiguous()
    zero = None
    if codes.zero is not None:
        zeros = codes.zero.reshape(1, 1) if quant_format.whole else codes.zero
        zero = zeros.expand(scale.shape).contiguous().numpy()
    return CodedMatrix(
        name=tensor.name,
        bits=4 if quant_format.bits <= 4 else 8,
        codes=stored.contiguous().numpy(),
        scale=scale.numpy(),
        zero=zero,
        is_float=quant_format.format == "fp8",
    )


@dataclass(frozen=True)
class RowPart:
    """Consecutive rows of an array: those of one matrix, or floats."""

    rows: slice
    matrix: CodedMatrix | None


class Index:
    """The quantised matrices of a checkpoint, found by their values.

    Exporters rename, transpose and join matrices. Their values tell which is which, and prove that codes replace nothing else.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._placed: set[str] = set()
        self._by_row: Mapping[bytes, list[Tensor]] = self._first_rows()

    def _first_rows(self) -> Mapping[bytes, list[Tensor]]:
        rows: dict[bytes, list[Tensor]] = defaultdict(list)
        for tensor in self._checkpoint.spec.weights():
            if (matrix := read_matrix(self._checkpoint, tensor)) is not None:
                rows[_key(matrix.values(slice(0, 1)))].append(tensor)
        return rows

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of all quantised tensors."""
        return frozenset(tensor.name for tensors in self._by_row.values() for tensor in tensors)

    @property
    def missing(self) -> list[str]:
        """Names of the tensors that were not found yet."""
        return sorted(self.names - self._placed)

    def parts(self, rows: Numbers) -> list[RowPart]:
        """Matrices that ``rows`` [O, I] consist of, in order; one part without a matrix where there are none."""
        parts: list[RowPart] = []
        start = floats = 0
        while start < len(rows):
            matrix = self._matrix_at(rows, start)
            if matrix is None:
                start += 1
                continue
            if floats < start:
                parts.append(RowPart(slice(floats, start), None))
            start = floats = start + len(matrix.codes)
            parts.append(RowPart(slice(start - len(matrix.codes), start), matrix))
        return [*parts, RowPart(slice(floats, start), None)] if floats < start else parts

    def _matrix_at(self, rows: Numbers, start: int) -> CodedMatrix | None:
        for tensor in self._by_row.get(_key(rows[start]), ()):
            matrix = read_matrix(self._checkpoint, tensor)
            assert matrix is not None
            if np.array_equal(rows[start : start + len(matrix.codes)], matrix.values()):
                self._placed.add(tensor.name)
                return matrix
        return None


def _key(row: Numbers) -> bytes:
    return (row.astype(np.float32).ravel() + np.float32(0)).tobytes()  # -0.0 becomes 0.0


def joined(matrices: list[CodedMatrix]) -> Iterator[CodedMatrix]:
    """Matrices joined along their outputs where they are of one kind, in wider codes and smaller groups if need be."""
    run: list[CodedMatrix] = []
    for matrix in [*matrices, None]:
        if matrix is not None and (not run or run[0].is_float == matrix.is_float):
            run.append(matrix)
            continue
        yield _joined(run)
        run = [] if matrix is None else [matrix]


def _joined(run: list[CodedMatrix]) -> CodedMatrix:
    group = int(np.gcd.reduce([matrix.group for matrix in run]))
    run = [matrix.with_group(group) for matrix in run]
    zero = None
    if any(matrix.zero is not None for matrix in run):
        zero = np.concatenate([np.zeros_like(m.scale, np.int8) if m.zero is None else m.zero for m in run])
    return CodedMatrix(
        name=run[0].name,
        bits=max(matrix.bits for matrix in run),
        codes=np.concatenate([matrix.codes for matrix in run]),
        scale=np.concatenate([matrix.scale for matrix in run]),
        zero=zero,
        is_float=run[0].is_float,
    )


def packed(matrix: CodedMatrix) -> tuple[Numbers, Numbers, Numbers | None]:
    """Codes uint8 [O, G, bytes of a group], scales float32 [O · G] and zero points uint8 as MatMulNBits reads them."""
    middle = 1 << (matrix.bits - 1)
    codes = (matrix.codes.astype(np.int16) + middle).astype(np.uint8)
    words = _pairs(codes) if matrix.bits == 4 else codes
    words = words.reshape(len(codes), matrix.scale.shape[1], -1)
    zero = None
    if matrix.zero is not None:
        zero = (matrix.zero.astype(np.int16) + middle).astype(np.uint8)
        zero = (_pairs(zero) if matrix.bits == 4 else zero).ravel()
    return words, matrix.scale.ravel(), zero


def _pairs(codes: Numbers) -> Numbers:
    """Two codes of 4 bits per byte, the even column in the low bits."""
    even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    paired: Numbers = even[:, 0::2] | (even[:, 1::2] << 4)
    return paired
