"""Speed of a planned shape beside the original, with random weights, since speed depends on shapes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.architectures.model_map import model_map
from compress.evaluation.latency_settings import PROMPT
from compress.passes.base import Context
from compress.spec.spec import Spec

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint


def work(spec: Spec) -> int:
    """Number of block weights that a token uses: an estimate from headers of the time for a prompt."""
    mapped = model_map(spec)
    return mapped.record.active_parameters(spec) - sum(t.count for t in mapped.outside if t.is_float)


class Stopwatch:
    """Times shapes of a checkpoint in this process. The original stays in memory beside each."""

    def __init__(self, checkpoint: Checkpoint, context: Context) -> None:
        import torch

        self.checkpoint, self.context = checkpoint, context
        generator = torch.Generator().manual_seed(context.seed)
        self.original = self._model(checkpoint.spec)
        positions = model_map(checkpoint.spec).positions or PROMPT
        embeddings: Any = self.original.get_input_embeddings()
        prompt = torch.randint(len(embeddings.weight), (1, min(PROMPT, positions)), generator=generator)
        self.prompt = prompt.to(context.device)

    def ratio(self, spec: Spec) -> float:
        """Ratio to the original's time for a prompt of 256 tokens, or fewer if the model has fewer positions."""
        from compress.evaluation.prefill import prefill_ratio

        return prefill_ratio(self.original, self._model(spec), self.prompt, seed=self.context.seed)

    def _model(self, spec: Spec) -> Any:
        from compress.models.loading import load_checkpoint
        from compress.models.noise import with_noise

        noise = with_noise(self.checkpoint, spec, self.context.seed)
        return load_checkpoint(noise, dtype=self.context.dtype, device=self.context.device)
