"""Folders of .wav files as calibration data."""

from __future__ import annotations

import array
import math
import wave
from pathlib import Path

import numpy
import pytest
import transformers

from compress.data.speech import features, fingerprint, of_speech, read_speech
from compress.errors import DataError
from compress.models.processors import SpeechProcessor
from tests import pico

RATE = 4000


def write(path: Path, *, rate: int = RATE, channels: int = 1, width: int = 2, seconds: float = 0.5) -> None:
    """A sine of 100 Hz; a second channel holds its negative halved."""
    count = int(rate * seconds)
    wanted = [math.sin(2 * math.pi * 100 * t / rate) / 2 for t in range(count)]
    values = [v * (1 if c == 0 else -0.5) for v in wanted for c in range(channels)]
    scale = 2 ** (8 * width - 1)
    code = {1: "B", 2: "h", 4: "i"}[width]
    data = array.array(code, [round(v * scale * 0.99) + (128 if width == 1 else 0) for v in values])
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data.tobytes())


@pytest.fixture(scope="module")
def extractor():
    return transformers.WhisperFeatureExtractor(
        feature_size=4, sampling_rate=RATE, hop_length=100, chunk_length=1, n_fft=400
    )


def test_read_speech_finds_sounds_and_transcripts(tmp_path):
    write(tmp_path / "b.wav")
    (tmp_path / "x").mkdir()
    write(tmp_path / "x/a.WAV")
    (tmp_path / "b.txt").write_text(" a word\n")
    (tmp_path / "notes.md").write_text("no sound")
    documents = read_speech(str(tmp_path))
    assert [(d.id, d.text) for d in documents] == [("b.wav", "a word"), ("x/a.WAV", "")]
    before = fingerprint(documents)
    (tmp_path / "b.txt").write_text("another")
    assert fingerprint(read_speech(str(tmp_path))) != before


def test_features_are_those_of_the_stock_extractor(tmp_path, extractor):
    write(tmp_path / "a.wav")
    sound = numpy.array(
        [round(math.sin(2 * math.pi * 100 * t / RATE) / 2 * 32768 * 0.99) / 32768 for t in range(RATE // 2)]
    )
    wanted = extractor(sound.astype(numpy.float32), sampling_rate=RATE, return_tensors="pt")["input_features"]
    assert features([str(tmp_path / "a.wav")], extractor).equal(wanted)


@pytest.mark.parametrize("changes", [{"rate": 8000}, {"width": 1}, {"width": 4}, {"channels": 2}])
def test_features_do_not_depend_on_rate_width_or_channels(changes, tmp_path, extractor):
    write(tmp_path / "a.wav")
    write(tmp_path / "b.wav", **changes)
    a, b = (features([str(tmp_path / f"{name}.wav")], extractor) for name in "ab")
    if changes == {"channels": 2}:  # the mean of both is a quarter as loud: 2 log10(4) / 4, and Whisper's floor
        assert a.shape == b.shape
    else:
        assert float((a - b).abs().median()) < 0.1


def test_of_speech_draws_sounds_with_the_ids_that_the_decoder_reads(tmp_path, extractor):
    for i in range(3):
        write(tmp_path / f"{i}.wav", seconds=0.2 + i / 10)
    (tmp_path / "1.txt").write_text("abc")
    documents = read_speech(str(tmp_path))
    processor = SpeechProcessor(extractor, pico.tokenizer(), 8)
    drawn = of_speech(documents, processor, None, seed=0, start=5)
    assert drawn.targets is not None
    assert drawn.target_mask is not None
    rows = {id_: drawn.targets[i][drawn.target_mask[i]].tolist() for i, id_ in enumerate(drawn.chosen)}
    ids = pico.tokenizer()("abc")["input_ids"]
    assert rows == {"0.wav": [5], "1.wav": [5, *ids[:-1]], "2.wav": [5]}
    read = drawn.values["input_features"]
    assert read.shape == (3, 4, 40)
    assert read[[2]].equal(features([str(tmp_path / drawn.chosen[2])], extractor))
    assert drawn.first(1).values["input_features"].shape[0] == 1
    with pytest.raises(DataError, match="asks for 4 samples, the folder has 3 sounds"):
        of_speech(documents, processor, 4, seed=0, start=5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"RIFF", r"a.wav: is no PCM sound: .*; save 16-bit PCM"),
        (b"", r"a.wav: is no PCM sound"),
    ],
)
def test_read_speech_refuses_damaged_files(content, message, tmp_path):
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_speech(str(tmp_path))


def test_read_speech_refuses_folders_without_sound(tmp_path):
    with pytest.raises(DataError, match=r"holds no .wav file"):
        read_speech(str(tmp_path))
    with pytest.raises(DataError, match="there is no such folder"):
        read_speech(str(tmp_path / "none"))
    write(tmp_path / "a.wav", seconds=0)
    with pytest.raises(DataError, match="holds 0 s of 16-bit sound"):
        read_speech(str(tmp_path))
