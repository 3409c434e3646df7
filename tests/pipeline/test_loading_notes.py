"""Card, report and terminal say what an output asks for to be loaded."""

from __future__ import annotations

import json

import pytest
import torch

from compress.checkpoint.running import INSTALL
from tests import pico


@pytest.mark.parametrize(
    ("settings", "store", "narrow"),
    [
        ({"weights": "mxfp4", "method": "rtn"}, "stock", "mxfp4"),
        ({"weights": "int4", "group_size": 16, "method": "rtn", "symmetric": False}, "compact", None),
        ({"weights": "fp16"}, "stock", None),
    ],
)
def test_loading_notes_name_needed_packages(settings, store, narrow, tmp_path, cli):
    recipe = {
        "model": str(pico.folder("llama", dtype=torch.bfloat16)),
        "output": str(tmp_path / "out"),
        "store": store,
        "passes": [{"cast": settings}],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    status, printed = cli("run", tmp_path / "recipe.yaml")
    assert status == 0
    card = (tmp_path / "out/README.md").read_text()
    report = json.loads((tmp_path / "out.run/report.json").read_text())
    said = [card, " ".join(printed.split()), *([" ".join(report["notes"])])]
    assert [INSTALL in text for text in said[1:]] == [narrow is not None] * 2
    assert ['dtype="auto"' in text for text in said] == [narrow is not None] * 3
    assert ('pip install transformers "compressed-tensors>=0.15"' in card) == (narrow is not None)
    assert ["trust_remote_code=True" in text for text in said] == [store == "compact"] * 3
