"""The scale of nvfp4's scales. Matrices that servers join share it: vLLM takes the largest of theirs for all."""

from __future__ import annotations

import torch

from compress.architectures.model_map import model_map
from compress.checkpoint.values import Checkpoint
from compress.solvers.quant_format import global_scale
from compress.spec.spec import Spec


class GlobalScales:
    """Global scales of a checkpoint's matrices, from the largest weight of each group of joined ones; made when asked for."""

    def __init__(self, checkpoint: Checkpoint, spec: Spec) -> None:
        self._checkpoint, self._spec, self._mapped = checkpoint, spec, model_map(checkpoint.spec)
        self._known: dict[str, torch.Tensor] = {}

    def of(self, name: str) -> torch.Tensor | None:
        """Scale of a tensor, float32 [1]; None unless its planned format is nvfp4."""
        quant_format = self._spec.tensors[name].quant_format
        if quant_format is None or quant_format.format != "nvfp4":
            return None
        if name not in self._known:
            joined = [
                x.name for x in self._mapped.joined(name) if self._spec.tensors[x.name].quant_format == quant_format
            ]
            largest = max(float(self._checkpoint.tensor(other).data.abs().max()) for other in joined)
            self._known |= dict.fromkeys(joined, global_scale(largest))
        return self._known[name]
