"""Headers as safetensors reads them."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from compress.checkpoint.headers import TensorEntry, render_header


def test_render_header_is_read_by_safetensors(tmp_path):
    values = torch.arange(6.0).reshape(2, 3)
    header = render_header({"ünïcode": TensorEntry("F32", (2, 3), 0, 24)}, {"format": "pt"})
    (tmp_path / "x.safetensors").write_bytes(header + values.numpy().tobytes())
    assert torch.equal(load_file(tmp_path / "x.safetensors")["ünïcode"], values)
