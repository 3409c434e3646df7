"""Where outputs open: the measured table, the page that is written from it, and the sentence of plans and cards."""

from __future__ import annotations

import pytest
import torch

from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.runtimes import holdings, opened, runtimes_note, table
from compress.checkpoint.store import with_storage
from tests import pico
from tests.conftest import ROOT
from tests.passes.cast.test_schemes import SIZES
from tests.toolbox import plan
from tools.runtimes.page import page


@pytest.fixture(scope="module")
def llama():
    return open_checkpoint(pico.folder("llama", dtype=torch.bfloat16, **SIZES))


def test_every_cell_has_figures_or_the_reason_why_it_has_none():
    content = table()
    for name, model in content["models"].items():
        for artefact, facts in model["artefacts"].items():
            assert {"transformers", "onnxruntime"} <= facts["opens"].keys()
            assert facts["opens"].keys() <= content["runtimes"].keys()
            assert all(figures and figures.get("no", "x") for figures in facts["opens"].values()), (name, artefact)


def test_page_is_written_from_the_table():
    assert (ROOT / "docs/runtimes.md").read_text(encoding="utf-8") == "\n".join(page(table())) + "\n"


@pytest.mark.parametrize(
    ("settings", "held", "runs", "refused"),
    [
        ({"weights": "int4"}, ["int4"], {"transformers", "llama.cpp", "onnxruntime"}, set()),
        ({"scheme": "FP8_DYNAMIC"}, ["fp8 with inputs in fp8"], {"transformers", "onnxruntime"}, {"llama.cpp"}),
        ({"weights": "mxfp4"}, ["mxfp4"], {"transformers", "llama.cpp"}, {"onnxruntime"}),
    ],
)  # fmt: skip
def test_codes_open_where_the_table_says(llama, settings, held, runs, refused):
    spec = with_storage(plan(llama, "cast", method="gptq", **settings), "stock")
    assert holdings(spec) == held
    verdicts = {runtime.name: opens for runtime, opens in opened(spec).items()}
    assert {verdicts[name] for name in runs} == {True}
    assert {verdicts[name] for name in refused} <= {False}
    note = runtimes_note(spec)
    assert note.startswith("opens on a CPU in transformers 5")
    assert all(name in note.partition("; not in ")[2] for name in refused)


def test_a_class_that_was_not_tried_has_no_sentence():
    assert runtimes_note(open_checkpoint(pico.folder("vit")).spec) is None
