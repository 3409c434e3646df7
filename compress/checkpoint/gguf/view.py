"""A folder in the user's cache for a GGUF file: a link to it, its config, and the tokenizer made from its metadata."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.architectures.gguf import unknown_rules
from compress.checkpoint.sidecars import LinkedFolder
from compress.errors import CheckpointError, is_lack, one_line
from compress.files import temporary

_FILE = "model.gguf"
_BESIDE = "put the model's config.json and tokenizer.json beside it, and name the folder"


class GgufFolder(LinkedFolder):
    """A folder of the cache that stands for a GGUF file, to which it holds a link."""


def view(path: Path, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> GgufFolder:
    """Folder that stands for a GGUF file, made once for each version of the file.

    Raises:
        CheckpointError: transformers cannot make a tokenizer of the metadata, or the cache cannot be written.
    """
    import transformers

    path = path.resolve()
    _check_rules(path, metadata)
    state = path.stat()
    key = [str(path), state.st_size, state.st_mtime_ns, transformers.__version__, config]
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "compress/gguf"
    folder = home / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    if not folder.exists():
        try:
            home.mkdir(parents=True, exist_ok=True)
            with temporary(folder) as made:
                (made / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
                (made / _FILE).symlink_to(path)
                _tokenizer(made, path)
                if not folder.exists():  # another process may have been faster
                    made.rename(folder)
        except OSError as error:
            raise CheckpointError(f"cannot be written: {error.strerror}", where=str(home)) from error
    return GgufFolder(folder)


def _check_rules(path: Path, metadata: Mapping[str, Any]) -> None:
    """Check that transformers splits text as the file's tokenizer does: it would take GPT-2's rules for unknown ones.

    Raises:
        CheckpointError: it does not, or the file names no rules.
    """
    from transformers.integrations.gguf import gguf_tokenizer_mapping

    if unknown := unknown_rules(metadata, gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS):
        raise CheckpointError(
            f"has a tokenizer with the rules {unknown}, which transformers does not know", where=str(path), fix=_BESIDE
        )


def _tokenizer(folder: Path, path: Path) -> None:
    """Write the tokenizer files of the GGUF file that the folder holds a link to."""
    import transformers

    try:
        made: Any = transformers.PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=_FILE)
        made.save_pretrained(folder)
    except Exception as error:  # metadata may hold anything
        if is_lack(error):
            raise
        raise CheckpointError(
            f"holds no tokenizer that transformers can read: {one_line(error)}",
            where=str(path),
            fix=_BESIDE,
        ) from error
