"""A folder of images for each class ▶ documents ▶ pixels. Pillow (extra ``images``) is imported when an image is read."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.data.documents import Document
from compress.data.examples import Labels
from compress.errors import DataError, one_line

if TYPE_CHECKING:
    import torch

#: Files that count as images; others in a class's folder are ignored.
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def read_images(folder: str, labels: Labels) -> list[Document]:
    """One document for every image of ``folder/class/…``: the first of every class, then the second of each, and so on.

    So any beginning of the list has the classes as evenly as possible. Ids are paths below ``folder``. The text is the
    SHA-256 of the file, so equal images have equal texts.

    Args:
        labels: the classes, by the names of their folders.

    Raises:
        DataError: there is no such folder; a folder is no class of the model, or holds no image; a file is not an image.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError("there is no such folder", where=folder)
    entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
    if stray := next((entry for entry in entries if entry.is_file() and _is_image(entry)), None):
        raise DataError("lies in no folder of a class", where=str(stray), fix="images belong in FOLDER/CLASS/")
    images: list[tuple[int, str, Document]] = []
    for entry in (entry for entry in entries if entry.is_dir()):
        if (label := labels.read(entry.name)) is None:
            raise DataError(f"`{entry.name}` is not {labels.what}", where=str(entry), fix=labels.known)
        files = sorted(file for file in entry.rglob("*") if file.is_file() and _is_image(file))
        if not files:
            raise DataError(f"holds no image ({', '.join(SUFFIXES)})", where=str(entry))
        for index, file in enumerate(files):
            id_ = file.relative_to(root).as_posix()
            images.append((index, entry.name, Document(id_, _sha256(file), label=label, image=str(file))))
    if not images:
        raise DataError("holds no folder of a class", where=folder, fix="images belong in FOLDER/CLASS/")
    return [document for *_, document in sorted(images, key=lambda image: image[:2])]


def fingerprint(documents: Sequence[Document]) -> str:
    """SHA-256 over the images' files and their paths below the folder."""
    return hashlib.sha256("\n".join(f"{d.text} {d.id}" for d in documents).encode()).hexdigest()


def pixels(files: Sequence[str], processor: Any) -> torch.Tensor:
    """Pixels from the checkpoint's image processor, [images, channels, height, width]. Raises `DataError`."""
    read = [_opened(Path(file)) for file in files]
    try:
        values: torch.Tensor = processor(images=read, return_tensors="pt")["pixel_values"]
    except MemoryError:
        raise
    except Exception as error:  # its settings are a checkpoint's, of any type, and found wrong when they are used
        raise DataError(f"the image processor refuses it: {one_line(error)}", where=files[0]) from error
    return values


@contextmanager
def accepted(inputs: Mapping[str, Any]) -> Iterator[None]:
    """Within, a model's error about its pixels, such as a size that it refuses, becomes a `DataError` of one line."""
    try:
        yield
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        if (
            "pixel_values" not in inputs
            or type(error).__name__ == "OutOfMemoryError"
            or "allocate memory" in str(error)
        ):
            raise
        raise DataError(
            f"the model refuses what its image processor makes: {one_line(error)}", fix="mend preprocessor_config.json"
        ) from None


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".")


def _sha256(file: Path) -> str:
    """Digest of an image file whose structure is sound; damage in its data is found later, by `pixels`."""
    try:
        data = file.read_bytes()
        with _pillow(file).open(io.BytesIO(data)) as image:
            image.verify()
    except Exception as error:  # Pillow's plug-ins raise what they like
        raise _unreadable(file, error) from None
    return hashlib.sha256(data).hexdigest()


def _opened(file: Path) -> Any:
    """The image in RGB, turned as its EXIF data say, as transformers' own pipelines read images."""
    from PIL import ImageOps

    try:
        with _pillow(file).open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # as above
        raise _unreadable(file, error) from None


def _pillow(file: Path) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise DataError(
            "needs the package pillow, which is not installed",
            where=str(file),
            fix="pip install 'compress-toolkit[images]'",
        ) from None
    return Image


def _unreadable(file: Path, error: Exception) -> DataError:
    return error if isinstance(error, DataError) else DataError(f"cannot be read: {one_line(error)}", where=str(file))
