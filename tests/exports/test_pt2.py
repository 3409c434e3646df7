"""Programs of torch.export: a process with torch alone computes what transformers computes, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.checkpoint.open import open_checkpoint
from compress.exports import export, get
from compress.exports.forward import forward_of, sample
from compress.models.loading import load_checkpoint
from compress.progress import SilentProgress
from tests import pico, processes
from tests.toolbox import apply, write

LOAD = """
import sys, torch
assert "compress" not in sys.modules
inputs = torch.load(sys.argv[2])
torch.save(torch.export.load(sys.argv[1]).module()(**inputs), sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_pt2_equals_transformers_in_a_process_without_this_package(family: str, tmp_path: Path) -> None:
    cast = apply(open_checkpoint(pico.folder(family)), "cast", weights="int8", method="rtn")
    checkpoint = write(cast, tmp_path / "cast")
    path = tmp_path / "model.pt2"
    export(checkpoint, "pt2", path, get("pt2").settings(), SilentProgress())
    forward = forward_of(load_checkpoint(checkpoint, dtype="float32"))
    inputs = sample(forward, 3, 11)
    torch.save(inputs, tmp_path / "inputs.pt")
    processes.run(LOAD, path, tmp_path / "inputs.pt", tmp_path / "outputs.pt", foreign=True)
    with torch.no_grad():
        wanted = forward(**inputs)
    given = torch.load(tmp_path / "outputs.pt")
    assert all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))
