"""Checkpoint folder ▶ transformers model. Missing, unexpected and mismatched weights are errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.architectures.model_map import model_map
from compress.checkpoint.claims import outgrown
from compress.checkpoint.open import Stored, open_checkpoint
from compress.checkpoint.running import cache_format, input_formats
from compress.checkpoint.sidecars import safe_file
from compress.checkpoint.values import Checkpoint, torch_dtype
from compress.errors import CheckpointError, CompressError, DataError, is_lack
from compress.models.attention import implementation
from compress.models.classes import first_line, quiet_transformers, refusing, stock_class
from compress.spec.classes import SEQUENCE_CLASSIFICATION
from compress.spec.formats import FIXED_GROUPS
from compress.spec.spec import CACHE_SCALES, Spec, Tensor

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_model(
    folder: str | Path,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    ignore_auto_map: bool = False,
    offline: bool = False,
    quantized_activations: bool = True,
    quantized_kv_cache: bool = False,
    attention: str | None = None,
) -> PreTrainedModel:
    """Load the model of a checkpoint folder or hub id, in evaluation mode.

    Compact checkpoints are decoded by this package's code, never by the file in the folder. Stock checkpoints are loaded by
    the class that their config names.

    Args:
        dtype: ``float32``, ``bfloat16``, ``float16``; None for the checkpoint's own.
        trust_remote_code: allow a foreign ``auto_map``. ignore_auto_map: use transformers' own class instead.
        quantized_activations: round inputs of linear layers where the config says so, as stock transformers does.
        quantized_kv_cache: round keys and values where the config says so, as vLLM does and stock transformers does not.
        attention: attention function, see `attention.implementation`; None for transformers' own choice.

    Raises:
        CheckpointError: unknown model type; weights missing, unexpected or of the wrong shape.
    """
    stored = open_checkpoint(
        folder, trust_remote_code=trust_remote_code, ignore_auto_map=ignore_auto_map, offline=offline
    )
    return load_checkpoint(
        stored,
        dtype=dtype,
        device=device,
        quantized_activations=quantized_activations,
        quantized_kv_cache=quantized_kv_cache,
        attention=attention,
    )


def load_checkpoint(
    checkpoint: Checkpoint,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    quantized_activations: bool = True,
    quantized_kv_cache: bool = False,
    as_stored: bool = False,
    attention: str | None = None,
) -> PreTrainedModel:
    """Load the model of an opened checkpoint, or of one that a pass has changed and that is not written yet; see `load_model`.

    ``as_stored``: dequantise codes in the dtype of their scales, whatever dtype the model computes in.
    """
    import torch

    if outgrown(checkpoint.spec) and isinstance(checkpoint, Stored):
        check_keys(checkpoint)  # on the meta device: what does not fit the files is not allocated first
    computing = getattr(torch, dtype, None) if dtype else "auto"
    if not (computing == "auto" or (isinstance(computing, torch.dtype) and computing.is_floating_point)):
        raise CompressError(f"no model computes in {dtype!r}", where="dtype", fix="give float32, bfloat16 or float16")
    kwargs: dict[str, Any] = {"dtype": computing}
    if device != "cpu":
        kwargs["device_map"] = {"": device}
    read: Any = _Unread if isinstance(checkpoint, Stored) else values_in
    wanted = _decoded(checkpoint.spec, dtype, as_stored)
    state: dict[str, Any] = {t.name: read(checkpoint, t, wanted(t)) for t in checkpoint.spec.weights()}
    model = _load(checkpoint, kwargs, state, attention)
    if quantized_activations and (formats := input_formats(checkpoint.spec)):
        from compress.models.emulation import round_inputs

        names = {module: model_map(checkpoint.spec).in_memory(module) for module in formats}
        static_inputs = {names[module]: _static_inputs(checkpoint, f"{module}.weight") for module in formats}
        round_inputs(model, {names[module]: format_ for module, format_ in formats.items()}, static_inputs)
    if quantized_kv_cache and cache_format(checkpoint.spec):
        from compress.models.emulation import round_cache

        round_cache(model, _scales(checkpoint))
    return model


def load_for_samples(checkpoint: Checkpoint, **options: Any) -> PreTrainedModel:
    """`load_checkpoint`, for a model that reads several samples at once, also where its config names no padding token.

    Classifiers that score a text's last token refuse several texts then. Unpadded ones need no padding token; for padded ones
    the forward pass raises `DataError`.
    """
    return reading_several(load_checkpoint(checkpoint, **options))


def reading_several(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, which reads several samples at once from now on; see `load_for_samples`."""
    config: Any = model.config.get_text_config()
    if type(model).__name__.endswith(SEQUENCE_CLASSIFICATION.suffixes) and getattr(config, "pad_token_id", 0) is None:
        config.pad_token_id = -1  # no token's id, so that the last token is a text's last one
        model.register_forward_pre_hook(_refuse_padding, with_kwargs=True)
    return model


def _refuse_padding(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    mask = kwargs.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        raise DataError(
            "the samples are padded, and the model's config names no padding token, whose place tells where a text ends",
            fix="set pad_token_id in config.json",
        )


def _decoded(spec: Spec, dtype: str | None, as_stored: bool) -> Callable[[Tensor], torch.dtype | None]:
    """A function from a tensor of codes to the dtype that stock loaders dequantise it in; None for that of its scales.

    Codes of linear layers are dequantised in the model's dtype. Experts are fused while they are read: fp8 codes in float32,
    packed codes in the dtype of their scales.
    """
    import torch

    config = spec.structure.config
    computed = getattr(torch, dtype or str(config.get("dtype") or config.get("torch_dtype") or "float32"), None)
    mapped = model_map(spec)

    def wanted(tensor: Tensor) -> torch.dtype | None:
        if as_stored or spec.structure.compact or tensor.quant_format is None:
            return None
        if mapped.is_expert(tensor.name):
            return torch.float32 if tensor.quant_format.format == "fp8" else None
        return computed

    return wanted


class _Unread:
    """A tensor of a checkpoint on disk, which transformers' loader reads by indexing, as it reads slices of safetensors."""

    def __init__(self, checkpoint: Stored, tensor: Tensor, wanted: torch.dtype | None) -> None:
        self._checkpoint, self._tensor, self._wanted = checkpoint, tensor, wanted

    def __getitem__(self, index: Any) -> torch.Tensor:
        return values_in(self._checkpoint, self._tensor, self._wanted)[index]

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self._tensor.dtype)

    def is_floating_point(self) -> bool:
        return self._tensor.is_float


def values_in(checkpoint: Checkpoint, tensor: Tensor, wanted: torch.dtype | None) -> torch.Tensor:
    """The values of a tensor; codes are dequantised in the dtype ``wanted``, None for that of their scales."""
    from compress.checkpoint.storage.reading import logical_values

    value, quant_format = checkpoint.tensor(tensor.name), tensor.quant_format
    if wanted is None or value.codes is None or quant_format is None or quant_format.format in FIXED_GROUPS:
        return value.data
    codes = value.codes
    stored = (codes.codes, codes.scale.to(wanted), codes.zero, codes.overall)
    return logical_values(stored, value.mask, quant_format.to_json(), tensor.shape)


def _static_inputs(checkpoint: Checkpoint, name: str) -> Mapping[str, torch.Tensor]:
    """Tensors for quantising the inputs of a weight's layer, as `Codes.static_inputs`."""
    if isinstance(checkpoint, Stored):
        return checkpoint.static_inputs(name)
    codes = checkpoint.tensor(name).codes
    return {} if codes is None else codes.static_inputs


def _scales(checkpoint: Checkpoint) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    """A function from a block's number to the scales of its keys and values; 1 where the files have none, as in vLLM."""
    import torch

    stored = [tensor.name for tensor in checkpoint.spec.stored() if tensor.is_cache_scale]
    known = {(int(re.findall(r"\.(\d+)\.", name)[-1]), name[-len(".k_scale") :]): name for name in stored}

    def scales(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        names = [known.get((index, ending)) for ending in CACHE_SCALES]
        key, value = (torch.ones(1) if n is None else checkpoint.tensor(n).data.float() for n in names)
        return key, value

    return scales


def check_keys(checkpoint: Stored) -> None:
    """Raise `CheckpointError` where the stock class misses a tensor, does not know one, or expects another shape.

    The stock loader itself checks, with all parameters on the meta device.
    """
    import torch

    state = {t.name: torch.empty(t.shape, dtype=torch_dtype(t.dtype), device="meta") for t in checkpoint.spec.weights()}
    _load(checkpoint, {"dtype": "auto", "device_map": {"": "meta"}}, state)


@refusing
def _load(
    checkpoint: Checkpoint, kwargs: dict[str, Any], state: Mapping[str, Any], attention: str | None = None
) -> PreTrainedModel:
    """The model of a checkpoint's class with these tensors; reads no weight file that the folder may also hold."""
    folder = checkpoint.folder
    assert folder is not None
    with quiet_transformers():
        stock, config = stock_class(checkpoint)
        if attention is not None and (name := implementation(attention, checkpoint.spec, stock, config)):
            kwargs = {**kwargs, "attn_implementation": name}
        try:
            model, info = stock.from_pretrained(
                None,
                config=config,
                state_dict=dict(state),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, with names and shapes
                trust_remote_code=False,
                **kwargs,
            )
            if model.can_generate() and safe_file(folder, "generation_config.json").exists():
                model.generation_config = _generation_config(folder)
        except RuntimeError as error:
            if "size mismatch" in str(error) or "mismatched" in str(error):
                raise CheckpointError(f"config and weights disagree: {first_line(error)}", where=str(folder)) from error
            raise
    for what, key in (
        ("missing", "missing_keys"),
        ("of another shape", "mismatched_keys"),
        ("unknown to the model", "unexpected_keys"),
    ):
        if info[key]:
            name, *shapes = min((k if isinstance(k, tuple) else (k,) for k in info[key]), key=lambda k: str(k[0]))
            both = [", ".join(map(str, shape)) for shape in shapes]
            sizes = f" ([{both[0]}] in the files, [{both[1]}] by the config)" if len(both) == 2 else ""
            raise CheckpointError(
                f"config and weights disagree: {len(info[key])} weights are {what} for {stock.__name__}, "
                f"such as {name}{sizes}",
                where=str(folder),
            )
    result: PreTrainedModel = model.eval()
    return result


def _generation_config(folder: Path) -> Any:
    """The generation config beside the weights. Raises `CheckpointError` where it cannot be used."""
    import transformers

    try:
        return transformers.GenerationConfig.from_pretrained(folder)
    except Exception as error:  # it takes any value for any field, and breaks on some
        if is_lack(error):
            raise
        raise CheckpointError(
            f"cannot be used: {first_line(error)}",
            where=f"{folder}/generation_config.json",
            fix="mend it, or remove it: it only says how to generate",
        ) from error
