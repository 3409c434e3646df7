"""The check that a written checkpoint computes the same as the one handed to the writer, at once and token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compress.architectures.model_map import model_map
from compress.checkpoint.open import Stored
from compress.checkpoint.values import Checkpoint, Derived
from compress.errors import CheckpointError, is_lack
from compress.models.classes import arguments_of, cache_argument
from compress.models.loading import load_checkpoint
from compress.spec.edits import EDIT_KINDS

if TYPE_CHECKING:
    import torch

#: Tokens of the sample: a prompt, and the single steps after it.
PROMPT, STEPS = 16, 8
#: Attention windows are cut to this many tokens where the sample would fit into the model's own: a config may name windows
#: that its class does not use, and then only the cache forgets tokens.
WINDOW = 8
#: Largest difference, relative to the larger of 1 and the largest value. Tensors are equal bit by bit, but kernels chosen by
#: memory alignment, or for one token in place of many, may round otherwise.
_TOLERANCE, _STEPPED = 1e-4, 1e-3


def same_logits(handed: Checkpoint, stored: Stored, original: Checkpoint | None = None) -> None:
    """Compare the outputs of a written checkpoint with those of the one handed to the writer, on a short sample of token ids.

    A causal language model must also compute the same when it reads a prompt and then single tokens with its cache. A decoder
    reads the sample backwards. Models that take no token ids are not compared.

    Args:
        original: what the passes began with; a model that does not run, where this one does, is refused.

    Raises:
        CheckpointError: the outputs differ, or the written model does not run.
    """
    ids = _sample(stored)
    # without rounded inputs: a kernel's rounding would change codes; and with the values that files hold
    model = load_checkpoint(handed, dtype="float32", quantized_activations=False, as_stored=True)
    if model.main_input_name != "input_ids":
        return
    causal = False if model.config.is_encoder_decoder else _is_causal(stored)
    if model.config.is_encoder_decoder:
        before, stepped_before = _tried(_at_once, model, ids), None
    elif causal is None:
        before, stepped_before = _tried(_at_once, model, ids), _tried(_step_by_step, model, ids)
    else:
        before, stepped_before = _at_once(model, ids), None
    if before is None:  # the class reads more than token ids, or the passes broke it
        del model
        if original is not None and _tried(_at_once, load_checkpoint(original, dtype="float32"), ids) is not None:
            raise CheckpointError(
                "the model's class runs before the pass and fails after it, as where the last block of a kind is gone",
                where=str(stored.folder),
                fix="name other blocks in `layers`, or use another pass",
            )
        return
    del model
    model = load_checkpoint(stored, dtype="float32", quantized_activations=False, as_stored=True)
    after = _at_once(model, ids)
    _compare(before, after, _TOLERANCE, "the written model computes other values", stored)
    if stepped_before is not None:  # it may compute something else with its cache: compare with what it computed before
        if (stepped := _step_by_step(model, ids)) is not None:
            text = "the written model computes other values through its cache"
            _compare(stepped_before, stepped, _STEPPED, text, stored)
    elif causal and (stepped := _step_by_step(model, ids)) is not None:
        if (narrow := _narrowed(stored)) is not None:
            del model
            model = load_checkpoint(narrow, dtype="float32", quantized_activations=False, as_stored=True)
            after, stepped = _at_once(model, ids), _step_by_step(model, ids)
        text = (
            "the written model computes other values token by token, through its cache, than at once: its config may name "
            "windows of attention (`layer_types`, `sliding_window`) that its class does not use"
        )
        assert stepped is not None
        _compare(after, stepped, _STEPPED, text, stored)


def _narrowed(stored: Stored) -> Checkpoint | None:
    """The checkpoint with attention windows shorter than the sample; None where its own are, or it has none."""
    structure = stored.spec.structure
    window = structure.config.get("sliding_window")
    edits = tuple(EDIT_KINDS[edit.kind].narrowed(edit, WINDOW) for edit in structure.edits)
    wide = isinstance(window, int) and window > WINDOW
    if not wide and edits == structure.edits:
        return None
    config = {**structure.config, "sliding_window": WINDOW} if wide else structure.config
    structure = replace(structure, config=config, edits=edits)
    return Derived(stored, replace(stored.spec, structure=structure), stored.tensor)


def _sample(stored: Stored) -> torch.Tensor:
    """Token ids [1, T], within the model's positions."""
    import torch

    config = stored.spec.structure.config
    vocabulary = config.get("vocab_size")
    count = min(PROMPT + STEPS, model_map(stored.spec).positions or PROMPT + STEPS)
    return torch.arange(count).remainder(vocabulary if isinstance(vocabulary, int) and vocabulary > 0 else PROMPT)[None]


def _is_causal(stored: Stored) -> bool | None:
    """Whether the family decodes with a cache, by its written record; None without one, or where the code is not stock."""
    mapped = model_map(stored.spec)
    if mapped.record.source != "written" or (mapped.config.get("auto_map") and stored.trust_remote_code):
        return None
    return mapped.record.causal


def _tried(
    compute: Callable[[Any, torch.Tensor], torch.Tensor | None], model: Any, ids: torch.Tensor
) -> torch.Tensor | None:
    """Outputs of a model of a family without a written record; None where its class cannot, from token ids alone."""
    try:
        return compute(model, ids)
    except Exception as error:
        if is_lack(error):
            raise
        return None


def _at_once(model: Any, ids: torch.Tensor) -> torch.Tensor:
    import torch

    given = {"input_ids": ids}
    if model.config.is_encoder_decoder and "decoder_input_ids" in arguments_of(model):
        given["decoder_input_ids"] = ids.flip(1)
    with torch.inference_mode(), _seeded():
        output: torch.Tensor = model(**given)[0]
    return output


def _step_by_step(model: Any, ids: torch.Tensor) -> torch.Tensor | None:
    """Logits [1, T, V] of a prompt and of single tokens after it; None for models that return no cache."""
    import torch

    name = cache_argument(model)
    if not model.can_generate() or name is None:
        return None
    prompt = max(1, ids.shape[1] - STEPS)
    cached: dict[str, Any] = {}
    logits = []
    with torch.inference_mode(), _seeded():
        for piece in (ids[:, :prompt], *torch.split(ids[:, prompt:], 1, 1)):
            output = model(input_ids=piece, use_cache=True, **cached)
            if getattr(output, name, None) is None or not hasattr(output, "logits"):
                return None
            cached = {name: getattr(output, name)}
            logits.append(output.logits)
    return torch.cat(logits, 1)


@contextmanager
def _seeded() -> Iterator[None]:
    """Within, a class that draws random numbers, as diffusion models of text do for what they begin with, draws the same."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _compare(a: torch.Tensor, b: torch.Tensor, tolerance: float, text: str, stored: Stored) -> None:
    difference = float((a - b).abs().max())
    if not difference <= tolerance * max(1.0, float(a.abs().max())):
        raise CheckpointError(f"{text} (difference {difference:.3g})", where=str(stored.folder))
