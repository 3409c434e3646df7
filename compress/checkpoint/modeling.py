"""Loader of compact checkpoints of the `compress` toolkit, for stock transformers.

Stored codes and masked weights are decoded on loading. Low-rank factors, shared parameters and other edits are applied to the
stock class. `from_pretrained` returns an instance of that class or of a subclass; its `save_pretrained` writes a dense stock
checkpoint. Needs torch, transformers and safetensors. Apache-2.0.
"""

from __future__ import annotations

import inspect
import json
import pathlib
from dataclasses import dataclass, replace  # noqa: F401 - of the text that replaces imports below

import torch
import transformers
from safetensors import safe_open

from compress.checkpoint.attention.interface import register
from compress.checkpoint.edits.editing import edited_class
from compress.checkpoint.storage.reading import decode, part_names

#: Name suffixes of static scales and zero points of a layer's inputs.
INPUT_ARRAYS = ("input_scale", "input_zero_point", "input_global_scale")


class CompressConfig(transformers.PreTrainedConfig):
    """Config of a compact checkpoint. ``base``: the stock config. ``edits``: changes of structure."""

    model_type = "compress"

    def __init__(self, base=None, edits=None, format=1, **kwargs):
        super().__init__(**kwargs)
        self.base = base or {}
        self.edits = edits or []
        self.format = format


def decoded_state_dict(folder: str | pathlib.Path) -> dict[str, torch.Tensor]:
    """Decoded tensors of all weight files in the folder, by name."""
    folder = pathlib.Path(folder)
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if not (folder / files[0]).exists():  # if both exist, stock loaders take the single file
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    state = {}
    for name in files:
        if pathlib.Path(name).name != name:
            raise ValueError(f"{index}: the weight file {name!r} lies outside the folder")
        with safe_open(folder / name, framework="pt") as file:
            table = json.loads((file.metadata() or {}).get("compress.tensors", "{}"))
            coded = set()
            for tensor, row in table.items():
                storage, quant_format = tuple(row["storage"]), row.get("grid")
                keys = part_names(tensor, storage, quant_format)
                coded.update(keys.values())
                if quant_format is not None:  # these loaders round no inputs
                    coded.update(f"{tensor.rpartition('.')[0]}.{end}" for end in INPUT_ARRAYS)
                parts = {role: file.get_tensor(key) for role, key in keys.items()}
                state[tensor] = decode(parts, storage, tuple(row["shape"]), row["kept"] is not None, quant_format)[0]
            for key in file.keys():  # noqa: SIM118 - a file is not a dict
                if key not in coded:
                    state[key] = file.get_tensor(key)
    return state


def stock_config(config: CompressConfig) -> transformers.PreTrainedConfig:
    """The stock config that the compact one wraps."""
    if config.format != 1:
        raise ValueError(f"compact checkpoint format {config.format}: this modelling file reads format 1")
    base = dict(config.base)
    return transformers.AutoConfig.for_model(base.pop("model_type"), **base)


def load_stock(auto, folder, config, *, output_loading_info=False, **kwargs):
    """Model of the stock class that ``auto`` has for the config, with the folder's decoded weights.

    Raises ValueError if a weight is missing, unknown or has another shape, so that no weight stays random.
    """
    base = stock_config(config)
    names = base.architectures or []
    # without another auto class the model has no head; AutoModel knows one such class per family
    alone = auto is transformers.AutoModel and set(getattr(config, "auto_map", None) or ()) <= {
        "AutoConfig",
        "AutoModel",
    }
    stock = getattr(transformers, names[0], None) if names and (auto is None or alone) else None
    mapping = (auto or transformers.AutoModel)._model_mapping
    if stock is None and names and type(base) not in mapping:  # the auto class does not know the model's own class
        stock = getattr(transformers, names[0], None)
    stock = stock or mapping[type(base)]
    if isinstance(stock, (tuple, list)):
        stock = stock[0]
    state = decoded_state_dict(folder)
    if "add_pooling_layer" in inspect.signature(stock).parameters and not any(".pooler." in f".{n}" for n in state):
        kwargs["add_pooling_layer"] = False
    stock = edited_class(stock, config.edits)
    asked = getattr(config, "_attn_implementation", None)  # auto classes move the argument into the config
    if asked == "eager" or asked in transformers.AttentionInterface._global_mapping:
        kwargs.setdefault("attn_implementation", asked)
    model, info = stock.from_pretrained(None, config=base, state_dict=state, output_loading_info=True, **kwargs)
    unexpected = [] if auto is transformers.AutoModel else info["unexpected_keys"]
    for problem, keys in (
        ("missing", info["missing_keys"]),
        ("of another shape", info["mismatched_keys"]),
        ("unknown", unexpected),
    ):
        if keys:
            raise ValueError(f"{folder}: {len(keys)} weights are {problem}, such as {sorted(map(str, keys))[0]}")
    if model.can_generate() and (pathlib.Path(folder) / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return (model, info) if output_loading_info else model


class CompressModel:
    """Class that ``AutoModel….from_pretrained`` calls; it returns a model of the stock class."""

    auto = transformers.AutoModel
    _ignored = (
        "trust_remote_code",
        "adapter_kwargs",
        "code_revision",
        "_from_auto",
        "_commit_hash",
        "subfolder",
        "use_safetensors",
    )
    _download = ("cache_dir", "force_download", "local_files_only", "token", "revision", "proxies")

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Do nothing: a model that is saved later is a stock model."""

    @classmethod
    def from_pretrained(cls, folder, *args, config=None, **kwargs):
        """As `transformers.PreTrainedModel.from_pretrained`; dtype, device_map and others are passed on."""
        download = {k: kwargs.pop(k) for k in cls._download if k in kwargs}
        for key in cls._ignored:
            kwargs.pop(key, None)
        if not pathlib.Path(folder).is_dir():
            from huggingface_hub import snapshot_download

            folder = snapshot_download(str(folder), **{k: v for k, v in download.items() if v is not None})
        if not isinstance(config, CompressConfig) and getattr(config, "model_type", None) != "compress":
            config = CompressConfig.from_pretrained(folder)
        return load_stock(cls.auto, folder, config, **kwargs)


class CompressForCausalLM(CompressModel):
    auto = transformers.AutoModelForCausalLM


class CompressForMaskedLM(CompressModel):
    auto = transformers.AutoModelForMaskedLM


class CompressForSequenceClassification(CompressModel):
    auto = transformers.AutoModelForSequenceClassification


class CompressForTokenClassification(CompressModel):
    auto = transformers.AutoModelForTokenClassification


class CompressForQuestionAnswering(CompressModel):
    auto = transformers.AutoModelForQuestionAnswering


class CompressForImageClassification(CompressModel):
    auto = transformers.AutoModelForImageClassification


class CompressForSeq2SeqLM(CompressModel):
    auto = transformers.AutoModelForSeq2SeqLM


register()
