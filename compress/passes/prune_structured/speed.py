"""Speed of a planned shape beside the original, with random weights, since speed depends on shapes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.architectures.model_map import model_map
from compress.evaluation.latency_settings import PROMPT
from compress.passes.base import Context
from compress.spec.spec import Spec, Tensor

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.values import Checkpoint

#: Length of the repeated noise; a prime, so that rows differ and routers distribute the tokens.
_NOISE = 4099


def work(spec: Spec) -> int:
    """Number of block weights that a token uses: an estimate from headers of the time for a prompt."""
    mapped = model_map(spec)
    return mapped.record.active_parameters(spec) - sum(t.count for t in mapped.outside if t.is_float)


class Stopwatch:
    """Times shapes of a checkpoint in this process. The original stays in memory beside each."""

    def __init__(self, checkpoint: Checkpoint, context: Context) -> None:
        import torch

        from compress.models.loading import load_checkpoint

        self.checkpoint, self.context = checkpoint, context
        generator = torch.Generator().manual_seed(context.seed)
        self._noise = 0.02 * torch.randn(_NOISE, generator=generator)
        self.original = load_checkpoint(self._random(checkpoint.spec), dtype=context.dtype, device=context.device)
        positions = model_map(checkpoint.spec).positions or PROMPT
        embeddings: Any = self.original.get_input_embeddings()
        prompt = torch.randint(len(embeddings.weight), (1, min(PROMPT, positions)), generator=generator)
        self.prompt = prompt.to(context.device)

    def ratio(self, spec: Spec) -> float:
        """Ratio to the original's time for a prompt of 256 tokens, or fewer if the model has fewer positions."""
        from compress.evaluation.prefill import prefill_ratio
        from compress.models.loading import load_checkpoint

        candidate = load_checkpoint(self._random(spec), dtype=self.context.dtype, device=self.context.device)
        return prefill_ratio(self.original, candidate, self.prompt, seed=self.context.seed)

    def _random(self, spec: Spec) -> Checkpoint:
        from compress.checkpoint.values import Derived, Value

        return Derived(self.checkpoint, spec, lambda name: Value(self._values(spec.tensors[name])))

    def _values(self, tensor: Tensor) -> torch.Tensor:
        import torch

        from compress.checkpoint.values import torch_dtype

        dtype = torch_dtype(tensor.dtype)
        if not tensor.is_float:
            return torch.zeros(tensor.shape, dtype=dtype)
        return self._noise.to(dtype).repeat(-(-tensor.count // _NOISE))[: tensor.count].view(tensor.shape)
