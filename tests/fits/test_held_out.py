"""Samples that trials are measured on: other ones than the calibration's, from the same text."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from compress.checkpoint.open import open_headers
from compress.fits.held_out import other_samples
from compress.pipeline.datasets import DataSets
from compress.recipe import recipe_from_mapping
from tests import pico


def _data(folder, calibration):
    passes = [{"cast": {"weights": "int4"}}]
    recipe = recipe_from_mapping(
        {
            "model": str(folder),
            "output": "out",
            "document_separator": "<|doc|>",
            "data": {"calibration": calibration},
            "passes": passes,
        }
    )
    return DataSets(recipe, folder, open_headers(folder)[0].structure)


def _runs(rows, size=13):
    return {tuple(row[i : i + size]) for row in rows.tolist() for i in range(len(row) - size + 1)}


def test_other_samples_share_no_passage_with_the_calibration(texts):
    data = _data(pico.folder("llama"), {"files": [str(texts[0])], "samples": 12, "length": 32})
    ids = data.batches("calibration").ids
    held = other_samples(data, ids, 3)
    assert held.shape == (3, 32)
    assert _runs(held).isdisjoint(_runs(ids))
    assert torch.equal(held, other_samples(data, ids, 3))


@pytest.mark.parametrize(("rows", "expected"), [(20, slice(12, 15)), (14, None), (12, None)])
def test_other_samples_of_token_ids_are_the_rows_after(folders, tmp_path, rows, expected):
    ids = torch.randint(0, 90, (rows, 32), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, file := tmp_path / "ids.safetensors")
    data = _data(folders["llama"], {"files": [str(file)], "samples": 12})
    drawn = data.batches("calibration").ids
    held = other_samples(data, drawn, 3)
    assert held is None if expected is None else torch.equal(held, ids[expected])


def test_a_text_that_is_used_up_gives_no_other_samples(tmp_path, texts):
    (short := tmp_path / "short.txt").write_text(texts[0].read_text()[:2500])
    data = _data(pico.folder("llama"), {"files": [str(short)], "samples": 4, "length": 32})
    ids = data.batches("calibration").ids
    assert other_samples(data, ids, len(ids) * 20) is None
