"""Features of a model that losses compare: hidden states, queries, keys, values, and logits by parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from compress.architectures.groups import split_fused
from compress.data.images import accepted
from compress.errors import PassError
from compress.evaluation.tasks import LANGUAGE, MASKED, Task
from compress.models.blocks import find_blocks, record_of
from compress.models.classes import arguments_of

#: Largest difference, over the spread of logits, at which the head by itself counts as the model's own: in float32, else.
TOLERANCE = (1e-3, 3e-2)


@dataclass
class ForwardOutput:
    """Result of one forward pass.

    Attributes:
        last: hidden states after the last block and its norm [B, L, D]; logits of a classifier [B, classes], and of a model
            without a base of its own [B, L, V].
        states: hidden states by number: 0 before the first block, i after block i.
        vectors: queries, keys and values by block index, each [B, L, width].
    """

    last: torch.Tensor
    states: dict[int, torch.Tensor] = field(default_factory=dict)
    vectors: dict[int, tuple[torch.Tensor, ...]] = field(default_factory=dict)


class FeatureModel:
    """Runs a model for a task.

    Args:
        states: numbers of the hidden states to keep; 0 is the embeddings.
        vectors: indices of the blocks whose queries, keys and values are kept.

    Raises:
        PassError: queries, keys and values of this family are not known.
    """

    def __init__(self, model: Any, task: Task, states: Sequence[int] = (), vectors: Sequence[int] = ()) -> None:
        self.model = model
        self.task = task
        self.base = model.base_model
        self.states, self.vectors = tuple(states), tuple(vectors)
        self.takes = arguments_of(model)
        self._kind: Any = None
        if vectors:
            self.record = record_of(model)
            self.blocks = find_blocks(model, self.record)
            # transformers gives modules of some families other names than files have
            known = {name for name, _ in self.blocks[0].named_modules()}
            if self.record.attention is None or not known.issuperset(self._names()):
                raise PassError(
                    f"it is not known where queries, keys and values of {model.config.model_type} are",
                    key="losses",
                    fix="leave out `relations`",
                )
        #: whether logits are computed from hidden states, a few tokens at a time; `check` sets it
        self.by_parts = task in (LANGUAGE, MASKED) and self.base is not model
        #: whether `run` gives logits, as of T5, whose class is its own base
        self._whole = task in (LANGUAGE, MASKED) and self.base is model
        #: last hidden states [N, D] ▶ logits [N, V]; the linear layer itself if `check` finds that it is all
        self.head: Any = self.logits

    def parameters_of_head(self) -> list[torch.nn.Parameter]:
        """Parameters that `head` uses; some may be shared with the base."""
        if not self.by_parts:
            return []
        parameters = {
            id(p): p for n, child in self.model.named_children() if child is not self.base for p in child.parameters()
        }
        return list(parameters.values())

    def run(self, inputs: dict[str, torch.Tensor]) -> ForwardOutput:
        """One forward pass over [B, L] tokens, or [B, C, H, W] pixels."""
        target = self.model if self.task.labels == "classes" else self.base
        given = {name: value for name, value in inputs.items() if name in self.takes}
        if (pixels := given.get("pixel_values")) is not None:
            given["pixel_values"] = pixels.to(self.model.dtype)
        if "use_cache" in self.takes:
            given["use_cache"] = False  # type: ignore[assignment]
        with self._recording() as seen, accepted(given):
            out = target(**given, output_hidden_states=bool(self.states), return_dict=True)
        states = {i: out.hidden_states[i] for i in self.states}
        if self.task.labels == "classes" or self._whole:
            return ForwardOutput(out.logits, states, seen)
        self._kind = type(out)
        return ForwardOutput(out.last_hidden_state, states, seen)

    @contextmanager
    def _recording(self) -> Iterator[dict[int, tuple[torch.Tensor, ...]]]:
        seen: dict[int, tuple[torch.Tensor, ...]] = {}
        outputs: dict[int, dict[str, torch.Tensor]] = {i: {} for i in self.vectors}
        handles = []
        for i in self.vectors:
            for name in dict.fromkeys(self._names()):
                module = self.blocks[i].get_submodule(name)
                handles.append(module.register_forward_hook(_keep(outputs[i], name)))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()
        for i in self.vectors:
            seen[i] = self._split([outputs[i][name] for name in self._names()])

    def _names(self) -> tuple[str, str, str]:
        attention = self.record.attention
        assert attention is not None
        return attention.query, attention.key, attention.value

    def _split(self, outputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values from the outputs of three modules, or of one fused module."""
        attention, config = self.record.attention, self.model.config.to_dict()
        assert attention is not None
        if attention.layout == "separate":
            return tuple(outputs)
        heads = int(self.record.value(config, self.record.heads_key))
        sizes = heads, self.record.kv_heads(config), self.record.head_dim(config)
        return split_fused(outputs[0], attention.layout, *sizes)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] of last hidden states [N, D], computed by the model's own code around its base."""
        if not self.by_parts:
            return hidden  # `predicted` returned logits already
        stub = _Stub(self._kind, hidden[None])
        modules = self.model._modules
        name = next(n for n, child in modules.items() if child is self.base)
        modules[name] = stub
        try:
            ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
            out = type(self.model).forward(self.model, input_ids=ids, return_dict=True)
        finally:
            modules[name] = self.base
        result: torch.Tensor = out.logits[0]
        return result

    def predicted(self, output: ForwardOutput, inputs: dict[str, torch.Tensor], where: torch.Tensor) -> torch.Tensor:
        """Inputs of `head` for the tokens ``where`` (bool [B, L], classifier [B]): hidden states [N, D], or logits."""
        if self.by_parts or self.task.labels == "classes" or self._whole:
            return output.last[where]
        given = {name: value for name, value in inputs.items() if name in self.takes}
        logits: torch.Tensor = self.model(**given, return_dict=True).logits
        return logits[where]

    def check(self, inputs: dict[str, torch.Tensor]) -> bool:
        """Whether logits computed by parts equal the model's own. If not, they are computed whole from then on."""
        if not self.by_parts:
            return True
        training = self.model.training
        self.model.eval()
        short = {name: value[:1] for name, value in inputs.items()}
        given = {name: value for name, value in short.items() if name in self.takes}
        try:
            with torch.no_grad():
                whole = self.model(**given, return_dict=True).logits[0]
                hidden = self.run(short).last[0]
                fits = _near(self.logits(hidden), whole)
                last = self.model.get_output_embeddings()
                others = {id(p) for p in self.parameters_of_head()} - {id(p) for p in last.parameters()}
                plain = isinstance(last, torch.nn.Linear) and type(last).forward is torch.nn.Linear.forward
                if fits and not others and plain and _near(last(hidden), whole):
                    self.head = last
        except torch.OutOfMemoryError:
            raise
        except (TypeError, AttributeError, ValueError, RuntimeError, IndexError, KeyError, StopIteration):
            fits = False  # its head reads more of the base than hidden states
        self.model.train(training)
        self.by_parts = fits
        return fits


def _near(parts: torch.Tensor, whole: torch.Tensor) -> bool:
    tolerance = TOLERANCE[whole.dtype != torch.float32]
    parts, whole = parts.float(), whole.float()
    difference = (parts - whole).abs().max() if parts.shape == whole.shape else torch.tensor(torch.inf)
    return bool(difference <= tolerance * whole.std().clamp_min(1e-6))


class _Stub(torch.nn.Module):
    """Replaces a base model and returns given hidden states."""

    def __init__(self, kind: Any, hidden: torch.Tensor) -> None:
        super().__init__()
        self.kind, self.hidden = kind, hidden

    @property
    def decoder(self) -> Any:
        """OPT calls the decoder inside its base."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.kind(last_hidden_state=self.hidden)


def _keep(into: dict[str, torch.Tensor], name: str) -> Any:
    def hook(module: Any, args: Any, output: torch.Tensor) -> None:
        into[name] = output

    return hook


def without_dropout(model: Any) -> None:
    """Turn off all dropout. Modules hold rates as floats with ``drop`` in their names, or read them from the config."""
    for holder in (*model.modules(), model.config):
        for name, value in list(vars(holder).items()):
            if "drop" in name and isinstance(value, float):
                setattr(holder, name, 0.0)
        if isinstance(holder, torch.nn.modules.dropout._DropoutNd):
            holder.p = 0.0
