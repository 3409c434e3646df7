"""Files that are copied along with the weights: tokenizer, chat template, generation config, licence, custom code …"""

from __future__ import annotations

import os
import shutil
from pathlib import Path, PosixPath

from compress.errors import CheckpointError
from compress.files import expanded

#: Files that every pass writes anew, so they are not copied.
WRITTEN = frozenset({"config.json", "README.md", "compress.json", "modeling_compress.py"})
#: Suffixes of weights in this or other formats, which would be stale beside the new ones.
_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".tflite", ".npz",
    ".safetensors.index.json", ".bin.index.json", ".onnx_data",
)  # fmt: skip
_FOLDERS_LEFT = frozenset({".git", ".cache", "__pycache__", "onnx", "openvino", "coreml", "runs"})


class LinkedFolder(PosixPath):
    """The folder of a checkpoint whose user allows links to files outside of it."""


def with_links(reference: str | Path, allowed: bool) -> str | Path:
    """A folder or hub id as given; a local folder as `LinkedFolder` if links out of it are allowed."""
    folder = expanded(reference)
    return LinkedFolder(folder) if allowed and folder.is_dir() else reference


def find_sidecars(folder: Path) -> tuple[str, ...]:
    """Sorted relative paths of all files to copy. Raises `CheckpointError` for links that lead out of the folder."""
    paths, linked = [], isinstance(folder, LinkedFolder)
    home = Path(os.path.realpath(folder))
    seen = {str(home)}
    for root, folders, files in os.walk(folder, followlinks=linked):
        folders[:] = sorted(f for f in folders if f not in _FOLDERS_LEFT)
        if linked:  # a link may lead back to a folder around it
            real = {f: os.path.realpath(Path(root, f)) for f in folders}
            folders[:] = [f for f in folders if real[f] not in seen and not home.is_relative_to(real[f])]
            seen.update(real.values())
        for file in files:
            relative = (Path(root) / file).relative_to(folder)
            if file.endswith(_WEIGHTS) or file == ".gitattributes":
                continue
            safe_file(folder, str(relative))  # also for files that are not copied: some are read
            if str(relative) not in WRITTEN:
                paths.append(str(relative))
    return tuple(sorted(paths))


def safe_file(folder: Path, name: str) -> Path:
    """Path of a file of the checkpoint, which must be inside the folder. Raises `CheckpointError`.

    A symbolic link may lead elsewhere within the folder, or into the ``blobs`` of a hub cache. Others are refused unless the
    folder is a `LinkedFolder`: a downloaded checkpoint could otherwise have any file of the machine copied and published.
    """
    parts = Path(name).parts
    if not parts or ".." in parts or Path(name).is_absolute() or "\\" in name or "\0" in name:
        raise CheckpointError(f"names the file {name!r}, which is outside the folder", where=str(folder))
    path = folder / name
    try:
        target, home = path.resolve(strict=path.is_symlink()), folder.resolve()
    except PermissionError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except (OSError, RuntimeError, ValueError):  # ValueError: no file can have that name
        raise CheckpointError("is a broken symbolic link", where=str(path)) from None
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    inside = target.is_relative_to(home) or (blobs is not None and target.is_relative_to(blobs))
    if not inside and not isinstance(folder, LinkedFolder):
        raise CheckpointError(
            f"is a symbolic link to {target}, outside the checkpoint",
            where=str(path),
            fix="copy the file into the folder, or set allow_links: true if you made the link",
        )
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise CheckpointError("is neither a file nor a folder", where=str(path))
    return path


def copy_sidecars(source: Path, names: tuple[str, ...], target: Path) -> None:
    """Copy files, following links and keeping subfolders."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(safe_file(source, name), target / name)
