"""llama.cpp's codes, by libgguf: each matrix of the blocks is rounded to a type, such as ``IQ2_XS``, and decoded.

The importance matrix is llama.cpp's: the mean square of each input over the calibration ids, of the dense model.
"""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import torch
from libgguf import dequantize_rows, quantize_rows

from benchmarks.peers import worker


def compress(model: Any, ids: torch.Tensor, request: dict[str, Any]) -> None:
    """Round all linear layers of the blocks to the type that is the job's amount."""
    kind = gguf.GGMLQuantizationType[request["amount"]]
    base = model.base_model
    blocks = base.h if hasattr(base, "h") else base.layers
    layers = {id(m): m for block in blocks for m in block.modules() if isinstance(m, torch.nn.Linear)}
    squares: dict[int, torch.Tensor] = {}

    def add(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        rows = args[0].flatten(0, -2).double()
        squares[id(module)] = squares.get(id(module), torch.zeros(rows.shape[1])) + rows.square().sum(0)

    handles = [layer.register_forward_pre_hook(add) for layer in layers.values()]
    with torch.no_grad():
        for batch in ids.split(4):
            model(batch, use_cache=False)
        for handle in handles:
            handle.remove()
        for number, layer in layers.items():
            importance = (squares[number] / ids.numel()).float().numpy()
            codes = quantize_rows(np.ascontiguousarray(layer.weight.numpy()), kind, imatrix=importance)
            values = np.asarray(dequantize_rows(codes, kind)).reshape(layer.weight.shape)
            layer.weight.copy_(torch.from_numpy(values.astype(np.float32)))


if __name__ == "__main__":
    worker.run(compress)
