"""imatrix.gguf of a run: the mean squares of the inputs of the output's matrices, as llama.cpp's quantisation reads them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.pipeline.state import Run

NAME = "imatrix.gguf"
#: Tokens of a sample where the recipe names none, which is llama-imatrix's own number.
_CHUNK = 512


def imatrix_of(run: Run) -> bytes | None:
    """The file's contents, from the last stage that measured inputs.

    None where no stage did, where a later one changed the shapes of tensors, and for families that GGUF has not.
    """
    if not any(run.folder.inputs(key).exists() for key in run.keys):
        return None
    from compress.architectures.gguf import UnwritableError, gguf_layout
    from compress.blockwise.input_squares import read_input_squares
    from compress.checkpoint.open import open_checkpoint

    shapes: dict[str, tuple[int, ...]] | None = None
    for key in reversed(run.keys):
        spec = open_checkpoint(run.folder.stages / key, trust_remote_code=True).spec
        here = {t.name: t.shape for t in spec.stored()}
        if shapes is not None and here != shapes:
            return None
        shapes = here
        if (path := run.folder.inputs(key)).exists():
            try:
                layout = gguf_layout(spec.structure.config, shapes)
            except UnwritableError:
                return None
            return _contents(run, layout.tensors, shapes, read_input_squares(path))
    return None


def _contents(run: Run, places: Any, shapes: dict[str, tuple[int, ...]], squares: Any) -> bytes | None:
    import numpy as np

    from compress.exports.gguf.imatrix import Importance, imatrix_bytes

    experts: dict[str, dict[int, tuple[Any, int]]] = {}
    for name, (means, tokens) in squares.items():
        place = places.get(name)
        if place is not None and shapes[name][-2 if place.transposed else -1] == len(means):
            experts.setdefault(place.name, {})[place.expert or 0] = (means, tokens)
    entries = {}
    for name, rows in experts.items():
        width = len(next(iter(rows.values()))[0])
        sums, counts = np.zeros((1 + max(rows), width), np.float32), np.zeros(1 + max(rows), np.float32)
        for expert, (means, tokens) in rows.items():
            sums[expert], counts[expert] = means.numpy() * tokens, tokens
        entries[name] = Importance(sums, counts)
    if not entries:
        return None
    section = run.recipe.data.calibration
    assert section is not None  # a calibrated pass has read it
    names = [Path(file).name for file in section.files]
    return imatrix_bytes(entries, names or ["calibration"], section.length or _CHUNK)
