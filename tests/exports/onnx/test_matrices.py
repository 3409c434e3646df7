"""Codes as arrays: the same values, found in arrays that exporters have transposed and joined."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.values import Checkpoint
from compress.exports.base import ExportError
from compress.exports.onnx.matrices import CodedMatrix, Index, joined, packed, read_matrix
from compress.exports.onnx.supported import check_formats
from compress.models.loading import values_in
from tests import pico
from tests.passes.cast.test_schemes import SIZES
from tests.toolbox import apply, plan

CASTS = {
    "int8": {"weights": "int8"},
    "int4 asymmetric": {"weights": "int4", "group_size": 16, "symmetric": False, "store": "compact"},
    "int3": {"weights": "int3", "group_size": 8},
    "fp8": {"weights": "fp8"},
}


def cast(family: str, **settings: Any) -> Checkpoint:
    settings.pop("store", None)
    return apply(open_checkpoint(pico.folder(family)), "cast", method="rtn", **settings)


@pytest.mark.parametrize("name", CASTS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_read_matrix_has_the_values_of_the_checkpoint(family: str, name: str) -> None:
    checkpoint = cast(family, **CASTS[name])
    tensor = next(t for t in checkpoint.spec.weights() if t.quant_format is not None)
    matrix = read_matrix(checkpoint, tensor)
    assert matrix is not None
    wanted = values_in(checkpoint, tensor, torch.float32).numpy()
    assert np.array_equal(matrix.values(), wanted.T if tensor.quant_format.transposed else wanted)


def test_scales_of_blocks_are_those_of_their_rows_and_inputs() -> None:
    source = open_checkpoint(pico.folder("llama", dtype=torch.bfloat16, **SIZES))
    checkpoint = apply(source, "cast", scheme="FP8_BLOCK", method="rtn")
    coded = [t for t in checkpoint.spec.weights() if t.quant_format is not None]
    assert any(t.quant_format.block for t in coded)
    for tensor in coded:
        matrix = read_matrix(checkpoint, tensor)
        assert np.array_equal(matrix.values(), values_in(checkpoint, tensor, torch.float32).numpy()), tensor.name


def test_index_finds_joined_matrices_and_the_rows_between_them() -> None:
    checkpoint = cast("llama", weights="int4", group_size=8)
    names = [t.name for t in checkpoint.spec.weights() if t.quant_format is not None and t.shape[1] == 32][:2]
    matrices = [read_matrix(checkpoint, checkpoint.spec.tensors[name]) for name in names]
    floats = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    rows = np.concatenate([matrices[0].values(), floats, matrices[1].values()])
    index = Index(checkpoint)
    parts = index.parts(rows)
    assert [None if part.matrix is None else part.matrix.name for part in parts] == [names[0], None, names[1]]
    assert np.array_equal(rows[parts[1].rows], floats)
    assert set(index.missing) == index.names - set(names)


def test_index_places_no_codes_where_one_value_differs() -> None:
    checkpoint = cast("llama", weights="int4", group_size=8)
    name = next(t.name for t in checkpoint.spec.weights() if t.quant_format is not None)
    rows = read_matrix(checkpoint, checkpoint.spec.tensors[name]).values().copy()
    rows[-1, -1] += 1
    index = Index(checkpoint)
    assert [part.matrix for part in index.parts(rows)] == [None]
    assert name in index.missing


def matrix(bits: int, group: int, zeros: bool, seed: int) -> CodedMatrix:
    draw, middle = np.random.default_rng(seed), 1 << (bits - 1)
    shape = (4, 32 // group)
    zero = draw.integers(-middle, middle, shape).astype(np.int8) if zeros else None
    codes = draw.integers(-middle, middle, (4, 32)).astype(np.int8)
    return CodedMatrix(f"m{seed}", bits, codes, draw.standard_normal(shape).astype(np.float32), zero)


def test_joined_keeps_the_values_of_matrices_of_unlike_formats() -> None:
    matrices = [matrix(4, 16, False, 0), matrix(8, 32, False, 1), matrix(4, 8, True, 2)]
    (whole,) = joined(matrices)
    assert (whole.bits, whole.group) == (8, 8)
    assert np.array_equal(whole.values(), np.concatenate([each.values() for each in matrices]))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_unpacks_to_the_values(bits: int, zeros: bool) -> None:
    source = matrix(bits, 16, zeros, 0)
    words, scales, packed_zeros = packed(source)
    assert words.shape == (4, 2, 16 * bits // 8)
    for row in range(4):
        for column in range(32):
            block, place = divmod(column, 16)
            if bits == 4:
                code = words[row, block, place // 2] >> (4 * (place % 2)) & 15
            else:
                code = words[row, block, place]
            zero = 1 << (bits - 1)
            if packed_zeros is not None:
                zero = int(packed_zeros[row] >> (4 * block) & 15) if bits == 4 else int(packed_zeros[2 * row + block])
            value = np.float32(int(code) - zero) * scales[2 * row + block]
            assert value == source.values()[row, column]


def test_formats_without_an_operator_are_refused() -> None:
    checkpoint = apply(
        apply(open_checkpoint(pico.folder()), "cast", weights="bf16"), "cast", weights="mxfp4", method="rtn"
    )
    with pytest.raises(ExportError, match="ONNX cannot hold mxfp4 codes; cast with weights: int4"):
        check_formats(checkpoint.spec)


def test_codes_of_the_table_of_tokens_are_refused() -> None:
    settings = {"weights": "int8", "overrides": {"model.embed_tokens": "int8"}, "runtime": "vllm"}
    spec = plan(open_checkpoint(pico.folder()), "cast", method="rtn", **settings)
    with pytest.raises(
        ExportError, match=r"embed_tokens.weight: ONNX cannot hold codes of the table of tokens; leave it"
    ):
        check_formats(spec)
