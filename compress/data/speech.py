"""A folder of .wav files ▶ documents ▶ the features that a model reads. Needs no package for sound."""

from __future__ import annotations

import hashlib
import random
import wave
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.data.batches import Batches, Features
from compress.data.documents import Document
from compress.data.pairs import decoder_ids, padded
from compress.errors import DataError, one_line

if TYPE_CHECKING:
    import torch

#: Files that count as speech; others in the folder are ignored, but for transcripts.
SUFFIX = ".wav"
#: Longest recording to read, in seconds.
_LONGEST = 3600


def read_speech(folder: str) -> list[Document]:
    """One document for every .wav file below a folder, in the order of their names. Ids are paths below the folder.

    The text is the transcript in the .txt file of the same name; without one it is empty.

    Raises:
        DataError: there is no such folder; it holds no .wav file; a file is damaged, or no PCM sound.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError("there is no such folder", where=folder)
    files = sorted(
        f for f in root.rglob("*") if f.suffix.lower() == SUFFIX and not f.name.startswith(".") and f.is_file()
    )
    if not files:
        raise DataError(f"holds no {SUFFIX} file", where=folder)
    return [
        Document(file.relative_to(root).as_posix(), _transcript(file), speech=str(_checked(file))) for file in files
    ]


def fingerprint(documents: Sequence[Document]) -> str:
    """SHA-256 over the files, their transcripts and their paths below the folder."""
    whole = hashlib.sha256()
    for document in documents:
        assert document.speech is not None
        with Path(document.speech).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{digest} {document.id}\0{document.text}\0".encode())
    return whole.hexdigest()


def of_speech(documents: Sequence[Document], processor: Any, samples: int | None, seed: int, start: int) -> Batches:
    """``samples`` sounds (all with None), drawn by seed, with their transcripts as targets.

    Args:
        processor: feature extractor and tokenizer. start: the token that the decoder begins with.

    Raises:
        DataError: there are fewer; or no sound can be read.
    """
    import torch

    order = list(documents)
    random.Random(seed).shuffle(order)
    if len(order) < (samples or 1):
        raise DataError(f"the recipe asks for {samples} samples, the folder has {len(order)} sounds")
    order = order[:samples]
    tokenizer = processor.tokenizer
    targets = [
        decoder_ids(tokenizer, d.text, start, processor.longest, d.id) if d.text and tokenizer else [start]
        for d in order
    ]
    padding = (
        next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0) if tokenizer else 0
    )
    ids, mask = padded(targets, int(padding))
    name = processor.extractor.model_input_names[0]
    files = [str(document.speech) for document in order]
    read = Features(name, files, partial(features, extractor=processor.extractor))
    return Batches(
        torch.arange(len(order))[:, None],
        chosen=tuple(document.id for document in order),
        targets=ids,
        target_mask=mask,
        features=read,
    )


def features(files: Sequence[str], extractor: Any) -> torch.Tensor:
    """Features of the files from the checkpoint's feature extractor, [files, …] of one shape.

    Raises:
        DataError: a file cannot be read, or the extractor refuses it.
    """
    rate = int(extractor.sampling_rate)
    read = [_samples(Path(file), rate) for file in files]
    try:
        made = extractor(read, sampling_rate=rate, return_tensors="pt", **_padding(extractor))
        values: torch.Tensor = made[extractor.model_input_names[0]]
    except MemoryError:
        raise
    except Exception as error:  # its settings are a checkpoint's, of any type, and found wrong when they are used
        raise DataError(f"the feature extractor refuses it: {one_line(error)}", where=files[0]) from error
    return values


def _padding(extractor: Any) -> dict[str, Any]:
    """Options for features of one length: Whisper's extractor pads to its own length by itself."""
    longest = getattr(extractor, "n_samples", None)
    return {} if longest else {"padding": True}


def _transcript(file: Path) -> str:
    text = file.with_suffix(".txt")
    try:
        return text.read_text(encoding="utf-8-sig").strip() if text.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {one_line(error)}", where=str(text)) from None


def _checked(file: Path) -> Path:
    """The file, after a look at its header."""
    try:
        with wave.open(str(file), "rb") as sound:
            seconds = sound.getnframes() / max(1, sound.getframerate())
            if not sound.getnframes() or seconds > _LONGEST or sound.getsampwidth() not in (1, 2, 4):
                raise DataError(
                    f"holds {seconds:.0f} s of {8 * sound.getsampwidth()}-bit sound",
                    where=str(file),
                    fix="save 8, 16 or 32 bits PCM, of an hour at most",
                )
    except (OSError, EOFError, wave.Error) as error:
        raise DataError(f"is no PCM sound: {one_line(error)}", where=str(file), fix="save 16-bit PCM") from None
    return file


def _samples(file: Path, rate: int) -> Any:
    """The sound as float32 in [-1, 1], the mean of its channels, at that rate (linear interpolation)."""
    import numpy

    try:
        with wave.open(str(file), "rb") as sound:
            width, channels, own = sound.getsampwidth(), sound.getnchannels(), sound.getframerate()
            data = sound.readframes(sound.getnframes())
        data = data[: len(data) // (width * channels) * (width * channels)]
        values: Any = numpy.frombuffer(data, {1: "u1", 2: "<i2", 4: "<i4"}[width]).astype(numpy.float32)
    except (OSError, EOFError, wave.Error, KeyError, ValueError) as error:
        raise DataError(f"is damaged: {one_line(error)}", where=str(file)) from None
    if not len(values):
        raise DataError("holds no sound", where=str(file))
    values = (values - 128) / 128 if width == 1 else values / 2 ** (8 * width - 1)
    values = values.reshape(-1, channels).mean(1)
    if own == rate:
        return values
    places = numpy.arange(max(1, int(len(values) * rate / own))) * (own / rate)
    return numpy.interp(places, numpy.arange(len(values)), values).astype(numpy.float32)
