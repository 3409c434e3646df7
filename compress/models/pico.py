"""Pico models with random weights, and inputs for them."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

import torch

from compress.architectures import pico_sizes
from compress.models.classes import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def pico_model(cls: Any, config: Any, seed: int = 0) -> PreTrainedModel:
    """A model of a class with random weights, float32, in evaluation mode, on the CPU.

    No weight is degenerate: norms are not all ones, biases and positions not all zeros, so that a lost bias or gain changes
    the outputs.
    """
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = cls(config_of(cls, config)).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                _scatter(parameter)
            for module in model.modules():
                mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
                if isinstance(mean, torch.Tensor) and isinstance(variance, torch.Tensor):
                    mean.normal_(std=0.1)
                    variance.uniform_(0.5, 1.5)
    result: PreTrainedModel = model
    return result


def config_of(cls: Any, config: Any) -> Any:
    """The config that a class is built with: of a wrapper's config, the part for this class; causal models decode."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    wanted = cls.config_class
    if wanted is not None and not isinstance(config, wanted):
        parts = [getattr(config, name, None) for name in config.sub_configs]
        config = next((part for part in parts if isinstance(part, wanted)), config)
    if cls.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and getattr(config, "is_decoder", None) is False:
        config = copy.deepcopy(config)
        config.is_decoder = True
    return config


def _scatter(values: torch.Tensor) -> None:
    """Make constant weights differ, and matrices large enough to matter."""
    if not values.is_floating_point() or not values.numel():
        return
    if not bool(values.isfinite().all()):
        values.normal_(std=0.1)
    elif values.ndim < 2 or float(values.std()) == 0:
        spread = float(values.std()) if values.numel() > 1 else 0.0
        if spread < 0.05:
            middle = float(values.mean())
            values.normal_(mean=middle if abs(middle) > 0.01 else 0.0, std=0.1)
    elif float(values.std()) < 0.05:
        values.mul_(0.5 * values.shape[-1] ** -0.5 / float(values.std()))


def dummy_inputs(model: Any, tokens: int = 12, seed: int = 0) -> dict[str, Any]:
    """Inputs of a model's forward pass, one sample: token ids, pixels, features of audio, ids of the decoder."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    parameters = inspect.signature(model.forward).parameters
    main = model.main_input_name
    inputs: dict[str, Any] = {}
    if "input_ids" in parameters and main not in ("pixel_values", "input_features", "input_values"):
        rows = pico_sizes.ROWS.get(config.model_type, 1)
        inputs["input_ids"] = torch.cat([_ids(config, tokens, generator) for _ in range(rows)])
    elif main == "pixel_values":
        inputs[main] = _pixels(config, generator)
    elif main in ("input_features", "input_values"):
        inputs[main] = _features(model, main, generator)
    if "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = _ids(config, tokens, generator, decoder=True)
    return inputs


def _ids(config: Any, tokens: int, generator: torch.Generator, decoder: bool = False) -> torch.Tensor:
    """Token ids [1, tokens] that are no special tokens."""
    data = config.to_dict()
    vocabulary = min(_sizes(data, "vocab_size") or [256])
    special = set(_specials(data))
    usual = [i for i in range(min(vocabulary, 256)) if i not in special] or [0]
    return torch.tensor(usual)[torch.randint(len(usual), (1, tokens), generator=generator)]


def _sizes(data: Any, name: str) -> list[int]:
    inner = [n for v in data.values() if isinstance(v, dict) for n in _sizes(v, name)]
    own = [
        v for k, v in data.items() if str(k).endswith(name) and isinstance(v, int) and v > 1 and "type" not in str(k)
    ]
    return own + inner


def _specials(data: Any) -> list[int]:
    inner = [n for v in data.values() if isinstance(v, dict) for n in _specials(v)]
    own = [v for k, v in data.items() if "token" in str(k) and isinstance(v, int) and not isinstance(v, bool)]
    lists = [n for k, v in data.items() if "token" in str(k) and isinstance(v, list) for n in v if isinstance(n, int)]
    return own + lists + inner


def _pixels(config: Any, generator: torch.Generator) -> torch.Tensor:
    """Pixel values [1, channels, height, width]."""
    data = config.to_dict()
    data = next((d for d in (data, data.get("vision_config"), data.get("encoder")) if d and "image_size" in d), data)
    size = data.get("image_size") or 64
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.randn(1, int(data.get("num_channels") or 3), height, width, generator=generator)


def _features(model: Any, main: str, generator: torch.Generator) -> torch.Tensor:
    """Features of audio: spectrograms [1, bins, frames], or [1, frames, bins]; waves [1, samples]."""
    config = model.config
    if main == "input_values":
        return torch.randn(1, 4000, generator=generator)
    bins = getattr(config, "num_mel_bins", None) or 80
    if (
        hasattr(config, "max_source_positions")
        and hasattr(config, "num_mel_bins")
        and not hasattr(config, "num_conv_layers")
    ):
        return torch.randn(1, bins, 2 * config.max_source_positions, generator=generator)
    return torch.randn(1, 64, getattr(config, "input_feat_per_channel", None) or bins, generator=generator)
