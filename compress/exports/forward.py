"""A model as a function of tensors, for torch's exporters: no cache, no dictionary of outputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from compress.errors import one_line
from compress.exports.base import ExportError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Inputs of text models, in the order of `Forward.forward`.
TEXT = ("input_ids", "attention_mask", "token_type_ids")
#: Outputs, of which those that a model has are exported; a base model's hidden states where it has none.
OUTPUTS = ("logits", "start_logits", "end_logits")
#: Names of the axes that stay free.
AXES = {0: "batch_size", 1: "sequence_length"}


class Forward(torch.nn.Module):
    """Text ▶ logits, or the last hidden states of a base model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        model.config.use_cache = False
        self.model = model
        self.outputs: tuple[str, ...] = ()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """The outputs named by ``outputs``."""
        kinds = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self._chosen(self.model(input_ids=input_ids, attention_mask=attention_mask, **kinds))

    def _chosen(self, output: Any) -> tuple[torch.Tensor, ...]:
        self.outputs = tuple(name for name in OUTPUTS if name in output) or ("last_hidden_state",)
        return tuple(output[name] for name in self.outputs)


class PixelForward(Forward):
    """Images ▶ logits, or the last hidden states of a base model."""

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        """The outputs named by ``outputs``."""
        return self._chosen(self.model(pixel_values=pixel_values))


def forward_of(model: PreTrainedModel) -> Forward:
    """The function of a model. Raises `ExportError` for one that reads neither text alone nor images alone."""
    if not model.config.is_encoder_decoder and model.main_input_name == "input_ids":
        return Forward(model).eval()
    if not model.config.is_encoder_decoder and model.main_input_name == "pixel_values":
        return PixelForward(model).eval()
    raise ExportError(
        f"{type(model).__name__} reads more than text or images, which no export does",
        fix="load the checkpoint in transformers",
    )


def sample(forward: Forward, batch: int = 2, length: int = 16) -> dict[str, torch.Tensor]:
    """Inputs by name, with padding at the end of the last text."""
    model, generator = forward.model, torch.Generator().manual_seed(0)
    if isinstance(forward, PixelForward):
        from compress.models.pico import dummy_inputs

        shape = dummy_inputs(model)["pixel_values"].shape[1:]
        return {"pixel_values": torch.randn(batch, *shape, generator=generator, dtype=model.dtype)}
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(2, vocabulary, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, length - length // 4 :] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in inspect.signature(model.forward).parameters and not hasattr(model, "lm_head"):
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return inputs


def free_axes(inputs: Mapping[str, torch.Tensor]) -> dict[str, dict[int, Any]]:
    """The axes of each input that stay free: texts, and tokens of a text."""
    return {name: {axis: title for axis, title in AXES.items() if axis == 0 or name in TEXT} for name in inputs}


@contextmanager
def exporting(name: str, exporter: str) -> Iterator[None]:
    """Within, an error of an exporter, or of a runtime, is one line for the user; ``name``: of the model's class."""
    from compress.errors import CompressError, is_lack

    try:
        with torch.no_grad():
            yield
    except CompressError:
        raise
    except Exception as error:
        if is_lack(error):
            raise
        raise ExportError(
            f"{exporter} fails on {name}: {one_line(error)}",
            fix="load the checkpoint in transformers",
        ) from error


def check_same(wanted: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor], share: float) -> None:
    """Raise `ExportError` where outputs differ by more than a share of their largest value."""
    for name, value in wanted.items():
        difference = float((value.float() - given[name].float()).abs().max())
        if not difference <= share * float(value.abs().max()):
            raise ExportError(
                f"the exported graph computes other values than the model: {name} differ by {difference:.2g}",
                fix="load the checkpoint in transformers",
            )
