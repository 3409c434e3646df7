"""Loads a compact checkpoint of the `compress` toolkit as the stock transformers model that it stands for.

Weights may be stored by codecs (a keep-mask and the kept values, say) instead of densely; they are decoded on loading, and
layers may be two factors, and blocks may share parameters. What `from_pretrained` returns is an instance of the stock
class, or of one made from it; its `save_pretrained` writes a dense stock checkpoint.
Needs torch and transformers. Apache-2.0.
"""

from __future__ import annotations

import inspect
import json
import pathlib

import torch
import transformers
from safetensors import safe_open

from compress.checkpoint.decode import decode, part_names
from compress.checkpoint.edits import edited_class

#: Ends of the names of arrays that round a layer's inputs.
INPUT_ARRAYS = ("input_scale", "input_zero_point", "input_global_scale")


class CompressConfig(transformers.PreTrainedConfig):
    """Config of a compact checkpoint: ``base`` is the stock config, ``edits`` the changes of structure on top of it."""

    model_type = "compress"

    def __init__(self, base=None, edits=None, format=1, **kwargs):
        super().__init__(**kwargs)
        self.base = base or {}
        self.edits = edits or []
        self.format = format


def decoded_state_dict(folder: str | pathlib.Path) -> dict[str, torch.Tensor]:
    """Dense tensors of every weight file in the folder, under their stock names."""
    folder = pathlib.Path(folder)
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if not (folder / files[0]).exists():  # where both are there stock loaders take the single file
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
                if quant_format is not None:  # inputs are not rounded here
                    coded.update(f"{tensor.rpartition('.')[0]}.{end}" for end in INPUT_ARRAYS)
                parts = {role: file.get_tensor(key) for role, key in keys.items()}
                state[tensor] = decode(parts, storage, tuple(row["shape"]), row["kept"] is not None, quant_format)[0]
            for key in file.keys():  # noqa: SIM118 - a file is no dict
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
    """Build the stock class that ``auto`` gives for the config, with the folder's decoded weights.

    Raises ValueError where a weight is missing or of another shape: nothing is ever left at random.
    """
    base = stock_config(config)
    names = base.architectures or []
    # where no other auto class is named, the model is one without a head, of which AutoModel knows one of a family alone
    alone = auto is transformers.AutoModel and set(getattr(config, "auto_map", None) or ()) <= {
        "AutoConfig",
        "AutoModel",
    }
    stock = getattr(transformers, names[0], None) if names and (auto is None or alone) else None
    stock = stock or (auto or transformers.AutoModel)._model_mapping[type(base)]
    if isinstance(stock, (tuple, list)):
        stock = stock[0]
    state = decoded_state_dict(folder)
    if "add_pooling_layer" in inspect.signature(stock).parameters and not any(".pooler." in f".{n}" for n in state):
        kwargs["add_pooling_layer"] = False
    stock = edited_class(stock, config.edits)
    model, info = stock.from_pretrained(None, config=base, state_dict=state, output_loading_info=True, **kwargs)
    unexpected = [] if auto is transformers.AutoModel else info["unexpected_keys"]
    for what, found in (
        ("missing", info["missing_keys"]),
        ("of another shape", info["mismatched_keys"]),
        ("unknown", unexpected),
    ):
        if found:
            raise ValueError(f"{folder}: {len(found)} weights are {what}, such as {sorted(map(str, found))[0]}")
    if model.can_generate() and (pathlib.Path(folder) / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return (model, info) if output_loading_info else model


class CompressModel:
    """What ``AutoModel…from_pretrained`` calls; it hands back a model of the stock class."""

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
        """Nothing to register: what is saved later is a stock model."""

    @classmethod
    def from_pretrained(cls, folder, *args, config=None, **kwargs):
        """See `transformers.PreTrainedModel.from_pretrained`; dtype, device_map and the like are passed on."""
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
