"""The tokenizer and the image processor beside a checkpoint's weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.claims import largest_number
from compress.checkpoint.sidecars import safe_file
from compress.errors import CheckpointError
from compress.models.classes import first_line, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


#: Largest side of an image, in pixels, that a checkpoint may ask for; larger ones take gigabytes.
_PIXELS = 16_384


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's files."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    return any(safe_file(folder, name).exists() for name in names)


def check_has_tokenizer(folder: Path) -> None:
    """Raise `CheckpointError` where a folder holds no tokenizer's files."""
    if not has_tokenizer(folder):
        raise CheckpointError(
            "has no tokenizer, which text needs", where=str(folder), fix="copy the tokenizer's files into it"
        )


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside the weights. Raises `CheckpointError` where there is none or it cannot be read."""
    import transformers

    folder = folder if isinstance(folder, Path) else Path(folder)
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
                raise TypeError("chat_template is not a text")
            return tokenizer
    except (MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raise bare Exception for damaged files, and panic, which is none
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"the tokenizer cannot be read: {first_line(error)}", where=str(folder)) from error


def load_image_processor(folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Load the image processor beside the weights, with Pillow. Raises `CheckpointError` as `load_tokenizer` does."""
    import transformers

    if not (
        path := safe_file(folder if isinstance(folder, Path) else Path(folder), "preprocessor_config.json")
    ).exists():
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
        raise CheckpointError(f"the image processor cannot be read: {first_line(error)}", where=str(folder)) from error


@dataclass(frozen=True)
class SpeechProcessor:
    """The readers of sound and of transcripts.

    Attributes:
        extractor: feature extractor. tokenizer: None where the folder holds none. longest: most tokens of a transcript.
    """

    extractor: Any
    tokenizer: Any
    longest: int


def load_speech_processor(
    folder: str | Path, longest: int | None, *, trust_remote_code: bool = False
) -> SpeechProcessor:
    """Load the feature extractor and the tokenizer beside the weights. Raises `CheckpointError` as `load_tokenizer` does.

    Args:
        longest: most tokens of a text; None for 448, Whisper's.
    """
    import transformers

    if not safe_file(Path(folder), "preprocessor_config.json").exists():
        raise CheckpointError(
            "has no feature extractor, which sound needs",
            where=str(folder),
            fix="copy preprocessor_config.json into it",
        )
    try:
        with quiet_transformers():
            extractor = transformers.AutoFeatureExtractor.from_pretrained(  # type: ignore[no-untyped-call]
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        _ = int(extractor.sampling_rate), extractor.model_input_names[0]
    except Exception as error:  # as above
        raise CheckpointError(
            f"the feature extractor cannot be read: {first_line(error)}", where=str(folder)
        ) from error
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code) if has_tokenizer(Path(folder)) else None
    return SpeechProcessor(extractor, tokenizer, longest or 448)
