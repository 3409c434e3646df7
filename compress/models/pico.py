"""Pico models with random weights, and inputs for them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from compress.architectures import pico_sizes
from compress.errors import is_lack
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
        return
    spread = float(values.std()) if values.numel() > 1 else 0.0
    if values.ndim < 2 or spread <= 1e-6 * float(
        values.abs().max()
    ):  # the deviation of equal values may be a rounding error
        if spread < 0.05:
            middle = float(values.mean())
            values.normal_(mean=middle if abs(middle) > 0.01 else 0.0, std=0.1)
    elif spread < 0.05:
        values.mul_(0.5 * values.shape[-1] ** -0.5 / spread)


def dummy_inputs(model: Any, tokens: int = 12, seed: int = 0) -> dict[str, Any]:
    """Inputs of a model's forward pass, one sample: token ids, pixels, features of audio, ids of the decoder.

    The first inputs that the model runs with are returned, text alone before text and pixels.

    Raises:
        Exception: the model runs with none of them; the error is that of the simplest.
    """
    first: Exception | None = None
    for inputs in _candidates(model, tokens, torch.Generator().manual_seed(seed)):
        try:
            with torch.inference_mode(), quiet_transformers():
                model(**inputs)
        except Exception as error:
            if is_lack(error):
                raise
            first = first or error
        else:
            return inputs
    raise first or TypeError(f"{type(model).__name__} takes neither token ids nor pixels nor features")


def _candidates(model: Any, tokens: int, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    """Inputs to try, the simplest first."""
    config = model.config
    data = config.to_dict()
    parameters = inspect.signature(model.forward).parameters
    rows = pico_sizes.ROWS.get(config.model_type, 1)
    ids = torch.cat([_ids(model, data, tokens, generator) for _ in range(rows)])
    if config.model_type in pico_sizes.STREAMS:
        ids = _ids(model, data, tokens, generator)[..., None].expand(-1, -1, pico_sizes.STREAMS[config.model_type])
    decoder: dict[str, Any] = {}
    if "decoder_input_ids" in parameters:
        streams = pico_sizes.DECODER_STREAMS.get(config.model_type, 0)
        drawn = [_ids(model, data, tokens, generator) for _ in range(streams or 1)]
        decoder["decoder_input_ids"] = torch.stack(drawn, -1) if streams else drawn[0]
    media = [m for m in ("pixel_values", "input_features", "input_values", "flattened_patches") if m in parameters]
    if "input_ids" in parameters and model.main_input_name not in media:
        yield {"input_ids": ids, **decoder}
    for name in media:
        for value in _media(name, data, tokens, generator):
            alone = {name: value, **decoder}
            if model.main_input_name != "input_ids":
                yield alone
            beside = {k: v for k, v in _beside(parameters, data, ids).items() if k not in alone}
            if beside:
                yield {**alone, **beside}
    if "shared_kv_states" in parameters:
        yield {"input_ids": ids, **_shared_states(config, tokens, generator)}
    if "bbox" in parameters:
        yield {"input_ids": ids, "bbox": torch.zeros(1, tokens, 4, dtype=torch.long), **decoder}


def _beside(parameters: Mapping[str, Any], data: Mapping[str, Any], ids: torch.Tensor) -> dict[str, Any]:
    """Token ids and masks that go with pixels or features, by the names of arguments."""
    patches = 16
    queries = torch.zeros_like(ids)
    queries[:, : int(data.get("latent_query_num") or 0)] = 1
    known = {
        "input_ids": ids,
        "qformer_input_ids": ids,
        "image_embeds_position_mask": queries,
        "image_attention_mask": torch.ones(*ids.shape, 1, dtype=torch.long),
        "pixel_attention_mask": torch.ones(1, patches, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]]),
        "bbox": torch.zeros(1, ids.shape[-1], 4, dtype=torch.long),
    }
    if "state" in parameters:  # of a robot with one camera, and a noisy chunk of its actions
        actions = int(data.get("chunk_size") or 1), int(data.get("max_action_dim") or 1)
        known["state"] = torch.ones(1, int(data.get("max_state_dim") or 1))
        known["noise"] = torch.linspace(-1, 1, actions[0] * actions[1]).reshape(1, *actions)
        known["timestep"] = torch.tensor([0.5])
        known["pixel_attention_mask"] = torch.ones(1, 1, dtype=torch.bool)
    return {name: value for name, value in known.items() if name in parameters}


def _shared_states(config: Any, tokens: int, generator: torch.Generator) -> dict[str, Any]:
    """The last token's vectors, and keys and values for each kind of layer, from a model that the class drafts tokens for."""

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    text = config.get_text_config()
    sizes = {kind: text.per_layer_config[i] for i, kind in enumerate(text.layer_types)}
    shapes = {kind: (1, own.num_key_value_heads, tokens, own.head_dim) for kind, own in sizes.items()}
    states = {kind: (noise(*shape), noise(*shape)) for kind, shape in shapes.items()}
    return {"inputs_embeds": noise(1, 1, 2 * config.backbone_hidden_size), "shared_kv_states": states}


def _ids(model: Any, data: Mapping[str, Any], tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Token ids [1, tokens] that are no special tokens; where a class looks for the end of the text, the last is that."""
    vocabulary = min(_sizes(data, "vocab_size") or [256])
    special = set(_specials(data))
    usual = [i for i in range(min(vocabulary, 256)) if i not in special] or [0]
    ids = torch.tensor(usual)[torch.randint(len(usual), (1, tokens), generator=generator)]
    end = data.get("eos_token_id")
    if "SequenceClassification" in type(model).__name__ and data.get("is_encoder_decoder") and isinstance(end, int):
        ids[:, -1] = end
    return ids


def _sizes(data: Mapping[str, Any], name: str) -> list[int]:
    inner = [n for v in data.values() if isinstance(v, dict) for n in _sizes(v, name)]
    own = [
        v for k, v in data.items() if str(k).endswith(name) and isinstance(v, int) and v > 1 and "type" not in str(k)
    ]
    return own + inner


def _specials(data: Mapping[str, Any]) -> list[int]:
    inner = [n for v in data.values() if isinstance(v, dict) for n in _specials(v)]
    own = [v for k, v in data.items() if "token" in str(k) and isinstance(v, int) and not isinstance(v, bool)]
    lists = [n for k, v in data.items() if "token" in str(k) and isinstance(v, list) for n in v if isinstance(n, int)]
    return own + lists + inner


def _media(name: str, data: Mapping[str, Any], tokens: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Pixels, spectrograms, waves or patches of one sample, in the layouts that models take."""

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    size = _field(data, "image_size") or _field(data, "img_size") or 64
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels, patch = int(_field(data, "num_channels") or 3), _field(data, "patch_size")
    flat = channels * int(patch) ** 2 if isinstance(patch, int) else 0
    if name == "pixel_values":
        yield noise(1, channels, height, width)
        yield noise(1, 1, channels, height, width)
        if flat:
            yield noise(1, 16, flat)
    elif name == "flattened_patches":
        width = flat or int(_field(data, "patch_embed_hidden_size") or 0)
        rows = torch.arange(16)[None, :, None]
        yield torch.cat([rows // 4 + 1.0, rows % 4 + 1.0, noise(1, 16, width)], -1)  # row, column, pixels
    elif name == "input_values":
        yield noise(1, 4000)
        yield noise(1, 1, 4000)
        frames, bins = _field(data, "max_length"), _field(data, "num_mel_bins")
        if isinstance(frames, int) and isinstance(bins, int):
            yield noise(1, frames, bins)
    else:
        bins = next((b for n in pico_sizes.BINS if isinstance(b := _field(data, n), int)), 80)
        bins *= _field(data, "num_stacked_frames") or pico_sizes.STACKED.get(str(data.get("model_type")), 1)
        frames = _field(data, "max_source_positions")
        for count in ([2 * frames] if isinstance(frames, int) else []) + [64, 8 * tokens]:
            yield noise(1, bins, count)
            yield noise(1, count, bins)


def _field(data: Mapping[str, Any], name: str) -> Any:
    """A field of a config or of the first one nested in it that has it."""
    if data.get(name) is not None:
        return data[name]
    return next(
        (v for inner in data.values() if isinstance(inner, Mapping) and (v := _field(inner, name)) is not None), None
    )
