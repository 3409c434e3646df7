"""An exported ONNX graph: floats become codes where the checkpoint has codes, and narrow floats where these are exact.

Shapes: O outputs, I inputs, G groups of inputs per row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from compress.errors import PassError
from compress.exports.onnx.matrices import CodedMatrix, Index, Numbers, RowPart, joined, packed

#: Domain of onnxruntime's operators.
MICROSOFT = "com.microsoft"
#: Accuracy level at which products are computed with floats.
FLOATS = 1
#: Elements of the smallest array that is looked at.
LEAST = 1024
#: Group sizes of MatMulNBits.
BLOCKS = (256, 128, 64, 32, 16)


class GraphCodes:
    """Puts codes into a graph.

    Attributes:
        index: the checkpoint's matrices.
        accuracy: as ``accuracy_level`` of MatMulNBits: 1 computes with floats, 4 rounds inputs to 8 bits.
        nbits: whether products become MatMulNBits, an operator of onnxruntime. If not, codes are decoded by
            ``DequantizeLinear``, an operator of ONNX itself.
    """

    def __init__(self, model: ir.Model, index: Index, accuracy: int, *, nbits: bool) -> None:
        self.model, self.index, self.accuracy, self.nbits = model, index, accuracy, nbits
        self._values: dict[str, ir.Value] = {}

    def place(self) -> None:
        """Replace floats by codes, all other large floats by narrow ones.

        Raises:
            PassError: codes of a matrix were not found in the graph.
        """
        for value in list(self.model.graph.initializers.values()):
            tensor = value.const_value
            if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < LEAST or len(tensor.shape) < 2:
                continue
            array = tensor.numpy()
            if not self._place(value, array):
                self._narrow(value, array)
        if missing := self.index.missing:
            raise PassError(
                f"the exporter changed the values of {len(missing)} matrices, the first is {missing[0]}, so their codes "
                "have no place in the graph",
                fix="export the dense twin of `compress unpack`",
            )
        self.model.graph.sort()

    def _place(self, value: ir.Value, array: Numbers) -> bool:
        rows = array.reshape(len(array), -1)
        for transposed in (False, True):
            if transposed and array.ndim > 2:
                break
            parts = self.index.parts(rows.T if transposed else rows)
            if any(part.matrix for part in parts):
                self._replace(value, array, parts, transposed)
                return True
        return False

    def _replace(self, value: ir.Value, array: Numbers, parts: list[RowPart], transposed: bool) -> None:
        products = [use for use in value.uses() if use.idx == 1 and use.node.op_type == "MatMul"]
        if self.nbits and transposed:
            for use in products:
                self._multiply(use.node, array.T, parts)
        if value.uses():
            self._dequantize(value, array, parts, transposed)
        self._drop(value)

    # ---- MatMulNBits ----

    def _multiply(self, node: ir.Node, rows: Numbers, parts: list[RowPart]) -> None:
        outputs = []
        for number, (matrix, floats) in enumerate(_runs(parts, rows)):
            name = f"{node.name or node.outputs[0].name}/{number}"
            if matrix is None:
                weight = self._constant(f"{name}/weight", ir.tensor(np.ascontiguousarray(floats.T)))
                outputs.append(self._node("MatMul", [node.inputs[0], weight], name))
            elif block := _block(matrix):
                outputs.append(self._product(node.inputs[0], matrix.with_group(block), name))
            else:
                weight = self._decoded(matrix, f"{name}/weight", transposed=True)
                outputs.append(self._node("MatMul", [node.inputs[0], weight], name))
        result = outputs[0]
        if len(outputs) > 1:
            result = self._node("Concat", outputs, f"{node.name}/joined", axis=-1)
        _supersede(node, result, self.model.graph)

    def _product(self, inputs: ir.Value | None, matrix: CodedMatrix, name: str) -> ir.Value:
        outputs, columns = matrix.codes.shape
        words, scale, zero = packed(matrix)
        arrays: list[ir.Value | None] = [
            self._constant(f"{name}/codes", ir.tensor(words)),
            self._floats(f"{name}/scales", scale),
        ]
        if zero is not None:
            arrays.append(self._constant(f"{name}/zeros", ir.tensor(zero)))
        kind: dict[str, Any] = {
            "K": columns,
            "N": outputs,
            "bits": matrix.bits,
            "block_size": matrix.group,
            "accuracy_level": self.accuracy,
        }
        self.model.graph.opset_imports.setdefault(MICROSOFT, 1)
        return self._node("MatMulNBits", [inputs, *arrays], name, MICROSOFT, **kind)

    # ---- DequantizeLinear ----

    def _dequantize(self, value: ir.Value, array: Numbers, parts: list[RowPart], transposed: bool) -> None:
        name, pieces = str(value.name), []
        rows = array.T if transposed else array.reshape(len(array), -1)
        for number, (matrix, floats) in enumerate(_runs(parts, rows)):
            if matrix is not None:
                pieces.append(self._decoded(matrix, f"{name}/{number}", transposed))
            else:
                dense = np.ascontiguousarray(floats.T if transposed else floats)
                pieces.append(self._constant(f"{name}/{number}", ir.tensor(dense)))
        result = pieces[0]
        if len(pieces) > 1:
            result = self._node("Concat", pieces, f"{name}/joined", axis=1 if transposed else 0)
        if array.ndim > 2:
            shape = self._constant(f"{name}/shape", ir.tensor(np.array(array.shape, np.int64)))
            result = self._node("Reshape", [result, shape], f"{name}/shaped")
        _reuse(value, result)

    def _decoded(self, matrix: CodedMatrix, name: str, transposed: bool) -> ir.Value:
        """Values of a matrix, [I, O] if transposed.

        onnxruntime replaces a ``DequantizeLinear`` that a ``MatMul`` reads by a product with inputs of 8 bits. For an accuracy
        of 1 the same values come from ``Cast`` and ``Mul``, which it computes once, with floats.
        """
        if transposed and self.accuracy == FLOATS:
            return self._node("Transpose", [self._multiplied(matrix, name)], f"{name}/columns", perm=[1, 0])
        codes, scale, zero = matrix.codes, matrix.scale, matrix.zero
        axis = 1 if transposed else 0
        more: dict[str, Any] = {}
        if scale.shape[1] == 1:
            scale, zero = scale[:, 0], None if zero is None else zero[:, 0]
        else:
            axis, more = (0 if transposed else 1), {"block_size": matrix.group, "accuracy_level": self.accuracy}
        if transposed:
            codes, scale, zero = codes.T, scale.T, None if zero is None else zero.T
        inputs = [self._codes(f"{name}/codes", codes, matrix), self._floats(f"{name}/scales", scale)]
        if zero is not None:
            inputs.append(self._codes(f"{name}/zeros", zero, matrix))
        return self._node("DequantizeLinear", inputs, f"{name}/values", axis=axis, **more)

    def _multiplied(self, matrix: CodedMatrix, name: str) -> ir.Value:
        """Values of a matrix [O, I] by operators that are computed when a graph is loaded."""
        grouped = (*matrix.scale.shape, matrix.group)
        values = self._wide(self._codes(f"{name}/codes", matrix.codes.reshape(grouped), matrix), f"{name}/numbers")
        if matrix.zero is not None:
            zeros = self._codes(f"{name}/zeros", matrix.zero[..., None], matrix)
            values = self._node("Sub", [values, self._wide(zeros, f"{name}/offsets")], f"{name}/centred")
        scale = self._floats(f"{name}/scales", matrix.scale[..., None])
        shape = self._constant(f"{name}/shape", ir.tensor(np.array(matrix.codes.shape, np.int64)))
        product = self._node("Mul", [values, scale], f"{name}/values")
        return self._node("Reshape", [product, shape], f"{name}/rows")

    def _codes(self, name: str, codes: Numbers, matrix: CodedMatrix) -> ir.Value:
        dtype = ir.DataType.INT4 if matrix.bits == 4 else ir.DataType.INT8
        if matrix.is_float:
            dtype = ir.DataType.FLOAT8E4M3FN
            return self._constant(name, ir.Tensor(np.ascontiguousarray(codes).view(dtype.numpy()), dtype=dtype))
        return self._constant(name, ir.Tensor(np.ascontiguousarray(codes).astype(dtype.numpy()), dtype=dtype))

    # ---- floats ----

    def _narrow(self, value: ir.Value, array: Numbers) -> None:
        if (dtype := exact_dtype(array)) is not None:
            _reuse(value, self._widened(str(value.name), array, dtype))
            self._drop(value)

    def _floats(self, name: str, array: Numbers) -> ir.Value:
        dtype = exact_dtype(array) if array.size >= LEAST else None
        return (
            self._constant(name, ir.tensor(np.ascontiguousarray(array)))
            if dtype is None
            else self._widened(name, array, dtype)
        )

    def _widened(self, name: str, array: Numbers, dtype: ir.DataType) -> ir.Value:
        narrow = ir.Tensor(np.ascontiguousarray(array.astype(dtype.numpy())), dtype=dtype)
        return self._wide(self._constant(f"{name}/narrow", narrow), f"{name}/wide")

    def _wide(self, value: ir.Value, name: str) -> ir.Value:
        return self._node("Cast", [value], name, to=ir.DataType.FLOAT.value)

    # ---- nodes ----

    def _constant(self, name: str, tensor: Any) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.model.graph.register_initializer(value)
        return value

    def _node(self, kind: str, inputs: list[Any], name: str, domain: str = "", **attributes: Any) -> ir.Value:
        node = ir.node(kind, inputs, attributes=attributes, domain=domain, name=name)
        node.outputs[0].name = f"{name}/output"
        self.model.graph.append(node)
        return node.outputs[0]

    def _drop(self, value: ir.Value) -> None:
        assert not value.uses()
        del self.model.graph.initializers[str(value.name)]


def exact_dtype(array: Numbers) -> ir.DataType | None:
    """Float dtype of 16 bits that holds float32 values exactly; None without one."""
    for dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        with np.errstate(over="ignore", under="ignore"):
            if np.array_equal(array.astype(dtype.numpy()).astype(np.float32), array):
                return dtype
    return None


def _runs(parts: list[RowPart], rows: Numbers) -> list[tuple[CodedMatrix | None, Numbers]]:
    """Consecutive matrices joined, and the rows between them."""
    runs: list[tuple[CodedMatrix | None, Numbers]] = []
    waiting: list[CodedMatrix] = []
    for part in [*parts, None]:
        if part is not None and part.matrix is not None:
            waiting.append(part.matrix)
            continue
        if waiting:
            runs += [(matrix, rows[:0]) for matrix in joined(waiting)]
            waiting = []
        if part is not None:
            runs.append((None, rows[part.rows]))
    return runs


def _block(matrix: CodedMatrix) -> int:
    """Group size for MatMulNBits, which divides that of the matrix; 0 without one, and for fp8."""
    return 0 if matrix.is_float else next((block for block in BLOCKS if matrix.group % block == 0), 0)


def _reuse(old: ir.Value, new: ir.Value) -> None:
    """Let every reader of ``old`` read ``new``."""
    ir.convenience.replace_all_uses_with(old, new)


def _supersede(node: ir.Node, result: ir.Value, graph: ir.Graph) -> None:
    """Put ``result`` in the place of a node's only output."""
    output = node.outputs[0]
    if output.is_graph_output():
        name = output.name
        graph.outputs[list(graph.outputs).index(output)] = result
        result.shape, result.type = output.shape, output.type
        output.name, result.name = None, name
    _reuse(output, result)
    graph.remove(node, safe=True)


#: Bytes of arrays up to which a graph is one file; protobuf ends at 2 GiB.
ONE_FILE = 1 << 30


def save(model: ir.Model, path: Path) -> None:
    """Write a graph without the exporter's notes; its arrays in a file ``…_data`` beside it if they are large."""
    for node in model.graph:  # stack traces, with paths of this machine
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if size > ONE_FILE:
        ir.save(model, path, external_data=f"{path.name}_data")
    else:
        ir.external_data.load_to_model(model)
        ir.save(model, path)
