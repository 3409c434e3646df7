"""Encoders, classifiers and other models: the graph of torch's exporter, with codes in ``DequantizeLinear``."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.exports.forward import check_same, exporting, forward_of, free_axes, sample
from compress.exports.onnx.graph import GraphCodes, save
from compress.exports.onnx.matrices import Index

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint

#: Version of ONNX's operators: the first whose ``DequantizeLinear`` has blocks and four bits.
OPSET = 21


def write_traced(checkpoint: Checkpoint, path: Path, accuracy: int) -> None:
    """Write the graph of a model; batch and length stay free. Its outputs are compared with those of the model.

    Raises:
        ExportError: the exporter has no graph for the model. PassError: codes have no place in it.
    """
    import torch

    from compress.models.loading import load_checkpoint

    model: Any = load_checkpoint(checkpoint, dtype="float32", quantized_activations=False, attention=None)
    forward = forward_of(model)
    inputs = sample(forward)
    with exporting(type(model).__name__, "torch.onnx"), quiet():
        forward(**inputs)
        axes = {**dict.fromkeys(inputs), **free_axes(inputs)}
        program: Any = torch.onnx.export(
            forward, (), kwargs=inputs, dynamo=True, opset_version=OPSET, dynamic_shapes=axes,
            input_names=list(inputs), output_names=list(forward.outputs), verbose=False,
        )  # fmt: skip
    GraphCodes(program.model, Index(checkpoint), accuracy, nbits=False).place()
    save(program.model, path)
    with torch.no_grad():
        for shape in ((2, 16), (3, 11)):
            inputs = sample(forward, *shape)
            outputs = dict(zip(forward.outputs, forward(**inputs), strict=True))
            check_same(outputs, run(path, inputs), 1e-3)


def run(path: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    """Outputs of a graph in onnxruntime on the CPU, by name, computed with floats."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {name: value.numpy() for name, value in inputs.items()})
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


@contextmanager
def quiet() -> Iterator[None]:
    """Within, the exporter prints no warnings."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
