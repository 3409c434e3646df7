"""Which models another family's stock class can express, from headers alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from compress.architectures.conversions import shared_blocks
from compress.checkpoint.open import open_checkpoint
from tests import pico


def spec_of(family, **config):
    spec = open_checkpoint(pico.folder(family)).spec
    return replace(spec, structure=replace(spec.structure, config={**spec.structure.config, **config}))


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("roberta", {}),
        ("bert", {"is_decoder": True}),
        ("bert", {"position_embedding_type": "relative_key"}),
        ("bert", {"architectures": ["BertForPreTraining"]}),
    ],
)
def test_shared_blocks_is_none_without_a_counterpart(family, config):
    assert shared_blocks(spec_of(family, **config)) is None


@pytest.mark.parametrize(
    ("groups", "fits"),
    [
        ([[0, 1], [2, 3]], True),
        ([[0, 1, 2, 3]], True),
        ([[0, 2], [1, 3]], False),
        ([[0, 1], [2]], False),
        ([[0, 1]], False),
    ],
)
def test_shared_blocks_needs_equal_runs_that_cover_the_model(groups, fits):
    spec = spec_of("bert")
    conversion = shared_blocks(spec)
    assert conversion is not None
    assert conversion.expresses(spec, groups) is fits


def test_shared_blocks_takes_tensors_from_first_block_of_a_run():
    spec = spec_of("bert")
    conversion = shared_blocks(spec)
    after, sources = conversion.converted(spec, 2)
    made = after.tensors.keys() - sources.keys()
    assert {name.rpartition(".")[0] for name in made} == {f"albert.{module}" for module in conversion.identities}
    assert {name.split(".layer.")[1][0] for name in sources.values() if ".layer." in name} == {"0", "2"}
    assert after.structure.model_type == "albert"
    assert after.structure.class_name == "AlbertForMaskedLM"
