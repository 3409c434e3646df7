"""Checkpoint folder ▶ transformers model, strictly: nothing missing, unexpected or mismatched is let through."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from compress.architectures.model_map import model_map
from compress.checkpoint.claims import largest_number, outgrown
from compress.checkpoint.open import Stored, open_checkpoint
from compress.checkpoint.remote import is_model_class, remote_class
from compress.checkpoint.running import cache_format, input_formats
from compress.checkpoint.sidecars import safe_file
from compress.checkpoint.structure import to_json
from compress.checkpoint.values import Checkpoint, torch_dtype
from compress.errors import CheckpointError, CompressError, is_lack
from compress.spec.formats import FIXED_GROUPS
from compress.spec.spec import CACHE_SCALES, Spec, Structure, Tensor

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Pixels along a side of an image that a checkpoint may ask for; a picture of more takes gigabytes.
_PIXELS = 16_384
P = ParamSpec("P")
R = TypeVar("R")


def refusing(make: Callable[P, R]) -> Callable[P, R]:
    """What transformers raises while it makes a model is of the checkpoint: configs hold anything, and classes check little.

    Wraps a function whose first argument is a `Checkpoint`. What is the machine's, such as a lack of memory, is let through.
    """

    @functools.wraps(make)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return make(*args, **kwargs)
        except CompressError:
            raise
        except Exception as error:
            if is_lack(error):
                raise
            checkpoint: Any = args[0]
            said = f"config.json cannot be used: {type(error).__name__}: {_first_line(error)}"
            raise CheckpointError(said, where=str(checkpoint.folder)) from error

    return guarded


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
) -> PreTrainedModel:
    """The model of a checkpoint folder or hub id, in evaluation mode.

    Compact checkpoints are decoded by this package's code, never by the file in the folder. Stock ones are loaded by the
    class that their config names.

    Args:
        dtype: ``float32``, ``bfloat16``, ``float16``; None for the checkpoint's own.
        trust_remote_code: allow a foreign ``auto_map``. ignore_auto_map: take transformers' own class instead.
        quantized_activations: round inputs of linear layers where the config says so, as stock transformers does.
        quantized_kv_cache: round keys and values where the config says so, as vLLM does and stock transformers does not.

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
    )


def load_checkpoint(
    checkpoint: Checkpoint,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    quantized_activations: bool = True,
    quantized_kv_cache: bool = False,
    as_stored: bool = False,
) -> PreTrainedModel:
    """As `load_model`, of an opened checkpoint, or of one that a pass has changed and nobody has written yet.

    ``as_stored``: with the values that codes stand for in the dtype of their scales, whatever the model computes in.
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
    read: Any = _Unread if isinstance(checkpoint, Stored) else _values
    wanted = _decoded(checkpoint.spec, dtype, as_stored)
    state: dict[str, Any] = {t.name: read(checkpoint, t, wanted(t)) for t in checkpoint.spec.weights()}
    model = _load(checkpoint, kwargs, state)
    if quantized_activations and (formats := input_formats(checkpoint.spec)):
        from compress.models.emulation import round_inputs

        names = {module: model_map(checkpoint.spec).in_memory(module) for module in formats}
        given = {names[module]: _given(checkpoint, f"{module}.weight") for module in formats}
        round_inputs(model, {names[module]: format_ for module, format_ in formats.items()}, given)
    if quantized_kv_cache and cache_format(checkpoint.spec):
        from compress.models.emulation import round_cache

        round_cache(model, _scales(checkpoint))
    return model


def _decoded(spec: Spec, dtype: str | None, as_stored: bool) -> Callable[[Tensor], torch.dtype | None]:
    """Tensor of codes ▶ the dtype that its codes and scales are multiplied in, as stock loaders do; None for the scales' own.

    That of linear layers is the one the model computes in. Experts are fused while they are read: fp8 codes in float32, packed
    ones in the dtype of their scales.
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
        return _values(self._checkpoint, self._tensor, self._wanted)[index]

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self._tensor.dtype)

    def is_floating_point(self) -> bool:
        return self._tensor.is_float


def _values(checkpoint: Checkpoint, tensor: Tensor, wanted: torch.dtype | None) -> torch.Tensor:
    """The values of a tensor; of codes with scales in the dtype ``wanted``, where one is."""
    from compress.checkpoint.decode import logical_values

    value, quant_format = checkpoint.tensor(tensor.name), tensor.quant_format
    if wanted is None or value.codes is None or quant_format is None or quant_format.format in FIXED_GROUPS:
        return value.data
    codes = value.codes
    return logical_values(
        (codes.codes, codes.scale.to(wanted), codes.zero, codes.overall), value.mask, quant_format.to_json()
    )


def _given(checkpoint: Checkpoint, name: str) -> Mapping[str, torch.Tensor]:
    """What a checkpoint holds to cast the inputs of the layer of a weight, as `Codes.given`."""
    if isinstance(checkpoint, Stored):
        return checkpoint.given(name)
    codes = checkpoint.tensor(name).codes
    return {} if codes is None else codes.given


def _scales(checkpoint: Checkpoint) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    """Number of a block ▶ the scales of its keys and values; 1 where the files have none, as vLLM takes it."""
    import torch

    stored = [tensor.name for tensor in checkpoint.spec.stored() if tensor.is_cache_scale]
    known = {(int(re.findall(r"\.(\d+)\.", name)[-1]), name[-len(".k_scale") :]): name for name in stored}

    def scales(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        names = [known.get((index, ending)) for ending in CACHE_SCALES]
        key, value = (torch.ones(1) if n is None else checkpoint.tensor(n).data.float() for n in names)
        return key, value

    return scales


def check_keys(checkpoint: Stored) -> None:
    """Every key of the written files is one that the stock class asks for, of the right shape, and none is missing.

    The stock loader itself is asked, with all parameters on the meta device. Raises `CheckpointError`.
    """
    import torch

    state = {t.name: torch.empty(t.shape, dtype=torch_dtype(t.dtype), device="meta") for t in checkpoint.spec.weights()}
    _load(checkpoint, {"dtype": "auto", "device_map": {"": "meta"}}, state)


@refusing
def _load(checkpoint: Checkpoint, kwargs: dict[str, Any], state: Mapping[str, Any]) -> PreTrainedModel:
    """The model of a checkpoint's class with that state: the tensors of its spec, and no file that a folder may also hold."""

    folder = checkpoint.folder
    assert folder is not None
    with quiet_transformers():
        stock, config = stock_class(checkpoint)
        try:
            model, info = stock.from_pretrained(
                None, config=config, state_dict=dict(state), output_loading_info=True, trust_remote_code=False, **kwargs
            )
            if model.can_generate() and safe_file(folder, "generation_config.json").exists():
                model.generation_config = _generation_config(folder)
        except RuntimeError as error:
            if "size mismatch" in str(error) or "mismatched" in str(error):
                raise CheckpointError(
                    f"config and weights disagree: {_first_line(error)}", where=str(folder)
                ) from error
            raise
    for what, key in (
        ("missing", "missing_keys"),
        ("of another shape", "mismatched_keys"),
        ("unknown to the model", "unexpected_keys"),
    ):
        if info[key]:
            name = sorted(str(k[0] if isinstance(k, tuple) else k) for k in info[key])[0]
            raise CheckpointError(
                f"config and weights disagree: {len(info[key])} weights are {what} for {stock.__name__}, such as {name}",
                where=str(folder),
            )
    result: PreTrainedModel = model.eval()
    return result


@refusing
def stock_class(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """The transformers class of a checkpoint with its changes of structure, and its config object.

    Raises:
        CheckpointError: for unknown model types.
    """

    structure = checkpoint.spec.structure
    where = str(checkpoint.folder)
    found = config = None
    if structure.config.get("auto_map") and checkpoint.trust_remote_code:
        assert checkpoint.folder is not None
        found, config = remote_class(structure, checkpoint.folder)
    config = _config(structure, where) if config is None else config
    found = _stock_class(structure, config, where) if found is None else found
    pooled = "add_pooling_layer" in inspect.signature(found).parameters
    if pooled and not any(".pooler." in f".{name}" for name in checkpoint.spec.tensors):
        found = _without_pooler(found)
    if structure.edits:
        from compress.checkpoint.edits import edited_class

        found = edited_class(found, to_json(structure.edits))
    return found, config


def _config(structure: Structure, where: str) -> Any:
    """The config object of transformers' own class for the model type."""
    import transformers

    data = dict(structure.config)
    try:
        if data["model_type"] not in transformers.CONFIG_MAPPING:
            raise CheckpointError(
                f"the model type `{data['model_type']}` is unknown to transformers {transformers.__version__}",
                where=where,
            )
        return transformers.AutoConfig.for_model(**data)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"config.json cannot be used: {_first_line(error)}", where=where) from error
    except Exception as error:  # strict dataclass validation of configs raises errors of huggingface_hub's own
        if type(error).__module__.startswith("huggingface_hub"):
            raise CheckpointError(f"config.json cannot be used: {_first_line(error)}", where=where) from error
        raise


def _stock_class(structure: Structure, config: Any, where: str) -> Any:
    """The model class of transformers that a config names; of one that names none, the base model of its type."""
    import transformers

    name = structure.own_class
    found: Any = getattr(transformers, name, None) if name else None
    if name and not is_model_class(found):
        raise CheckpointError(f"transformers {transformers.__version__} has no model class {name}", where=where)
    if found is None:
        mapping: Any = transformers.AutoModel._model_mapping
        found = mapping.get(type(config), None)
        if isinstance(found, (tuple, list)):  # several, the usual one first
            found = found[0]
    if found is None:
        raise CheckpointError(
            f"transformers {transformers.__version__} has no base model of the type `{structure.model_type}`",
            where=where,
            fix="name the class in `architectures` of config.json",
        )
    return found


def arguments_of(model: Any) -> set[str]:
    """What a model's forward takes by name; a forward that hands on all it is given takes what that of its base class takes."""
    found: set[str] = set()
    for cls in type(model).__mro__:
        if (forward := vars(cls).get("forward")) is None:
            continue
        parameters = inspect.signature(forward).parameters.values()
        found |= {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        foreign = not cls.__module__.startswith("transformers.")  # stock ones name all they take
        if not any(p.kind is p.VAR_POSITIONAL or (foreign and p.kind is p.VAR_KEYWORD) for p in parameters):
            break
    return found - {"self"}


def _generation_config(folder: Path) -> Any:
    """How the model generates, from the file beside its weights. Raises `CheckpointError` where that says nothing sound."""
    import transformers

    try:
        return transformers.GenerationConfig.from_pretrained(folder)
    except Exception as error:  # it takes any value for any field, and breaks on some
        if is_lack(error):
            raise
        raise CheckpointError(
            f"cannot be used: {_first_line(error)}",
            where=f"{folder}/generation_config.json",
            fix="mend it, or remove it: it only says how to generate",
        ) from error


def _without_pooler(stock: Any) -> Any:
    """The base class of an encoder whose files hold no pooler, which sentence encoders leave out; nothing is left at random."""

    class Unpooled(stock):  # type: ignore[misc]
        def __init__(self, config: Any, **kwargs: Any) -> None:
            super().__init__(config, **{**kwargs, "add_pooling_layer": False})

    Unpooled.__name__, Unpooled.__qualname__, Unpooled.__module__ = stock.__name__, stock.__qualname__, stock.__module__
    return Unpooled


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer's files are there."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    return any(safe_file(folder, name).exists() for name in names)


def check_has_tokenizer(folder: Path) -> None:
    """Raises `CheckpointError` where a tokenizer's files are not there."""
    if not has_tokenizer(folder):
        raise CheckpointError(
            "has no tokenizer, which text needs", where=str(folder), fix="copy the tokenizer's files into it"
        )


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights. Raises `CheckpointError` where there is none or it cannot be read."""
    import transformers

    folder = Path(folder)
    check_has_tokenizer(folder)
    tokenizer: PreTrainedTokenizerBase
    try:
        with quiet_transformers():
            single = safe_file(folder, "tokenizer.json")
            if single.exists() and not safe_file(folder, "tokenizer_config.json").exists():
                tokenizer = transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
                    tokenizer_file=str(single)
                )
            else:
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=trust_remote_code
                )
            # settings of wrong types are found when they are used, not when they are read
            list(tokenizer("a")["input_ids"])
            _ = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
            if not isinstance(tokenizer.chat_template, (str, dict, type(None))):
                raise TypeError("chat_template is no text")
            return tokenizer
    except (MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raise bare Exception for damaged files, and panic, which is none
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"the tokenizer cannot be read: {_first_line(error)}", where=str(folder)) from error


def load_image_processor(folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The image processor beside the weights, which works with Pillow. Raises `CheckpointError` as `load_tokenizer` does."""
    import transformers

    if not (path := safe_file(Path(folder), "preprocessor_config.json")).exists():
        raise CheckpointError(
            "has no image processor, which images need", where=str(folder), fix="copy preprocessor_config.json into it"
        )
    try:
        if (side := largest_number(json.loads(path.read_text(encoding="utf-8")), "size")) > _PIXELS:
            raise ValueError(f"it makes images of {side} pixels a side")
        with quiet_transformers():
            return transformers.AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
                folder, backend="pil", local_files_only=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # as above
        raise CheckpointError(f"the image processor cannot be read: {_first_line(error)}", where=str(folder)) from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] if lines else type(error).__name__


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings of what is checked here anyway."""
    from transformers.utils import logging as untyped

    logging: Any = untyped

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars and os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") is None:
            logging.enable_progress_bar()
