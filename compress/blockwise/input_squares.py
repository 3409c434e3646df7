"""Mean squares of the inputs of matrices, kept in files: by block in a workspace, and together beside a stage.

They are the diagonal of H / T of the calibrated passes, llama.cpp's importance matrix. I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from compress.files import replacing
from compress.workspace import Workspace

_FOLDER, _TOKENS = "input_squares", ":tokens"


def save_input_squares(workspace: Workspace, index: int, squares: Mapping[str, tuple[torch.Tensor, int]]) -> None:
    """Save means [I] and numbers of tokens, by tensor, of a block."""
    if squares:
        tensors = {name: means.clone() for name, (means, _) in squares.items()}
        counts = {f"{name}{_TOKENS}": torch.tensor(tokens) for name, (_, tokens) in squares.items()}
        workspace.folder(_FOLDER).save_tensors(f"{index:05}", {**tensors, **counts})


def gather_input_squares(work: Path, target: Path) -> None:
    """Put the means of all blocks below a workspace into one file, those of a later run over the blocks last; none without."""
    from safetensors.torch import load_file, save_file

    files = sorted(work.glob(f"**/{_FOLDER}/*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    if files:
        with replacing(target) as temp:
            save_file({name: tensor for path in files for name, tensor in load_file(path).items()}, temp)


def read_input_squares(path: Path) -> dict[str, tuple[torch.Tensor, int]]:
    """Means [I] and numbers of tokens, by tensor."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    return {
        name: (means, int(tensors[f"{name}{_TOKENS}"])) for name, means in tensors.items() if not name.endswith(_TOKENS)
    }
