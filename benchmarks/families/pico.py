"""A pico checkpoint of a class, with the data that cells calibrate on and evaluate."""

from __future__ import annotations

import json
import random
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.families.classes import Subject

#: Samples and tokens of the calibration data.
SAMPLES, TOKENS = 4, 16
#: Arguments that are made of sounds, and samples of a sound in a second.
SOUNDS, RATE = ("input_features", "input_values"), 16_000
#: Pico models with more parameters would not be pico.
PARAMETERS = 30_000_000


class Unsuited(Exception):
    """There is no pico model of a class that transformers itself saves and runs."""


@dataclass(frozen=True)
class Pico:
    """A pico checkpoint.

    Attributes:
        folder: the checkpoint. other: one of the same config with other weights, a teacher.
        inputs: file with the arguments of a forward pass. samples: file with a list of such arguments, for calibration.
        data: argument ``data`` of `compress.apply`. text: documents. rows: labelled texts. images: a folder for each class.
    """

    folder: Path
    other: Path
    inputs: Path
    samples: Path
    data: Any
    text: Path
    rows: Path
    images: Path
    class_name: str
    main_input: str
    encoder_decoder: bool


def make(subject: Subject, place: Path, *, teacher: bool = True) -> Pico:
    """Write the checkpoint of a class, another one to teach it, and its data below ``place``.

    Raises:
        Unsuited: with the reason in one line.
    """
    import transformers

    from compress.models.classes import quiet_transformers
    from compress.models.pico import config_of, dummy_inputs, pico_model
    from compress.models.shrink import default_config, shrunken

    stage = "has no config of its own"
    try:
        with quiet_transformers():
            config = default_config(subject.model_type)
            stage = "the config cannot be shrunk"
            cls = getattr(transformers, subject.class_name)
            config = config_of(cls, shrunken(config))
            stage = "the shrunken config makes no model"
            with torch.device("meta"):
                count = sum(parameter.numel() for parameter in cls(config).parameters())
            if count > PARAMETERS:
                raise ValueError(f"{count:,} parameters")
            model = pico_model(cls, config)
            # before the first is saved, as then the config holds its dtype as text
            other = pico_model(cls, config, seed=1) if teacher else None
            stage = "cannot be saved by transformers"
            model.save_pretrained(place / "model")
            if other is not None:
                other.save_pretrained(place / "other")
            stage = "no inputs could be made"
            inputs = dummy_inputs(model)
            samples = [dummy_inputs(model, tokens=TOKENS, seed=seed) for seed in range(1, 1 + SAMPLES)]
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise Unsuited(f"{stage}: {type(error).__name__}: {text}") from error
    torch.save(inputs, place / "inputs.pt")
    torch.save(samples, place / "samples.pt")
    main = model.main_input_name
    for folder in (place / "model", place / "other") if teacher else (place / "model",):
        _write_processors(folder, main, inputs, config)
    text, rows, images = _write_data(place, config, inputs, main)
    data: Any = images
    if main in SOUNDS:
        data = _write_sounds(place / "sounds")
    elif _is_text(samples[0]):
        data = torch.cat([sample["input_ids"] for sample in samples])
    elif not images.exists() or not subject.class_name.endswith("ForImageClassification"):
        tensors = [name for name, value in samples[0].items() if isinstance(value, torch.Tensor)]
        data = {name: torch.cat([sample[name] for sample in samples]) for name in tensors}
    return Pico(
        place / "model", place / "other", place / "inputs.pt", place / "samples.pt", data, text, rows, images,
        subject.class_name, main,
        bool(getattr(config, "is_encoder_decoder", False)),
    )  # fmt: skip


def _is_text(sample: dict[str, Any]) -> bool:
    """Whether a model reads one text of token ids, and an encoder-decoder what it writes."""
    return (
        sample.keys() <= {"input_ids", "decoder_input_ids"} and "input_ids" in sample and sample["input_ids"].ndim == 2
    )


def _write_processors(folder: Path, main: str, inputs: dict[str, Any], config: Any) -> None:
    """The tokenizer, and a processor of images or a feature extractor of sounds, beside the weights."""
    if "input_ids" in inputs or "decoder_input_ids" in inputs:
        tokenizer().save_pretrained(folder)
    if main == "pixel_values" and inputs[main].ndim == 4:
        height, width = inputs[main].shape[-2:]
        processor = {
            "image_processor_type": "ViTImageProcessor", "size": {"height": height, "width": width}, "do_resize": True,
            "do_normalize": True, "do_rescale": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        }  # fmt: skip
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    if main in SOUNDS:
        processor = _extractor(main, inputs[main], config)
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def _extractor(main: str, values: torch.Tensor, config: Any) -> dict[str, Any]:
    """The settings of the feature extractor that transformers has for the model type, with as many bins as the model reads."""
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES

    name = FEATURE_EXTRACTOR_MAPPING_NAMES.get(config.model_type) or "Wav2Vec2FeatureExtractor"
    settings: dict[str, Any] = {"feature_extractor_type": name, "sampling_rate": RATE}
    if main == "input_values" and values.ndim == 2:
        return {**settings, "feature_size": 1, "return_attention_mask": False}
    if name == "WhisperFeatureExtractor":  # two frames for each position of the encoder
        bins, frames = values.shape[-2:]
        return {**settings, "feature_size": bins, "chunk_length": 2, "hop_length": 2 * RATE // frames}
    if main == "input_features" and name.startswith(("SeamlessM4T", "Wav2Vec2")):  # two frames beside each other
        bins = values.shape[-1] // 2
        name = "SeamlessM4TFeatureExtractor"
        return {**settings, "feature_extractor_type": name, "feature_size": bins, "num_mel_bins": bins, "stride": 2}
    bins = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", None) or values.shape[-1]
    return {**settings, "feature_size": bins, "num_mel_bins": bins}


def _write_sounds(folder: Path) -> Path:
    """Short recordings of noise, each with a transcript."""
    draw = random.Random(0)
    folder.mkdir()
    for i in range(SAMPLES):
        with wave.open(str(folder / f"{i}.wav"), "wb") as sound:
            sound.setnchannels(1)
            sound.setsampwidth(2)
            sound.setframerate(RATE)
            sound.writeframes(draw.randbytes(2 * RATE // 2))
        (folder / f"{i}.txt").write_text("klm nop qrs")
    return folder


def _write_data(place: Path, config: Any, inputs: dict[str, Any], main: str) -> tuple[Path, Path, Path]:
    """Documents, labelled rows and labelled images."""
    draw = random.Random(0)
    texts = [" ".join("".join(draw.choices("klmnopqrst", k=3)) for _ in range(6)) for _ in range(6)]
    (place / "text.txt").write_text("\n<|doc|>\n".join(texts))
    labels = sorted(getattr(config, "id2label", None) or {0: "LABEL_0", 1: "LABEL_1"})[:2]
    rows = [f"{text}\t{labels[i % len(labels)]}" for i, text in enumerate(texts)]
    (place / "rows.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    if main == "pixel_values" and inputs[main].ndim == 4:
        from PIL import Image

        channels, height, width = inputs[main].shape[-3:]
        for label in labels:
            (place / "images" / str(label)).mkdir(parents=True)
            for i in range(3):
                picture = Image.new("L" if channels == 1 else "RGB", (width, height))
                count = height * width * (1 if channels == 1 else 3)
                picture = Image.frombytes(picture.mode, picture.size, draw.randbytes(count))
                picture.save(place / "images" / str(label) / f"{i}.png")
    return place / "text.txt", place / "rows.tsv", place / "images"


def tokenizer() -> Any:
    """Byte-level BPE without merges: 6 special tokens, then 256 bytes."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<eos>", "<pad>", "<bos>", "<unk>", "<sep>", "<mask>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*special, *alphabet])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    names = ("eos_token", "pad_token", "bos_token", "unk_token", "sep_token", "mask_token")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, cls_token="<bos>", **dict(zip(names, special, strict=True))
    )
