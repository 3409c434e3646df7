"""What is inferred of a model is what the written record of its family says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

import compress
from compress import architectures
from compress.architectures.inference import infer, misfit
from compress.architectures.inference.roles import is_router
from compress.architectures.inferred import starred
from compress.architectures.model_map import ModelMap
from compress.checkpoint.open import open_checkpoint
from compress.errors import PassError
from compress.models.pico import pico_model
from compress.models.shrink import default_config, shrunken
from tests import pico
from tests.toolbox import edit_config

FAMILIES = [f for f in (*pico.FAMILIES, *pico.FURTHER) if architectures.find({"model_type": f})]
KEYS = ("depth_key", "hidden_key", "heads_key", "kv_heads_key", "experts_key", "active_experts_key", "causal", "input")


def both(family):
    """Maps of a family's pico model by its written record, and by the inferred one."""
    spec = open_checkpoint(pico.folder(family)).spec
    written, inferred = ModelMap(spec), ModelMap(spec)
    inferred.__dict__["record"] = infer(spec)
    return written, inferred


@pytest.mark.parametrize("family", pico.families(FAMILIES, tier=(*pico.TIER, "granite_swa", "deepseek_v3")))
def test_inferred_record_agrees_with_the_written_one(family):
    written, inferred = both(family)
    a, b = written.record, inferred.record
    assert (a.source, b.source) == ("written", "inferred")
    assert [block.path for block in written.blocks] == [block.path for block in inferred.blocks]
    assert (written.depth, written.embedding, written.positions) == (
        inferred.depth,
        inferred.embedding,
        inferred.positions,
    )
    assert {key: getattr(a, key) for key in KEYS} == {key: getattr(b, key) for key in KEYS}
    assert {*a.embeddings} == {*b.embeddings}
    assert {*a.per_layer} == {*b.per_layer}
    assert (written.has_head, written.tied) == (inferred.has_head, inferred.tied)
    assert [*a.ties(written.spec)][-1:] == [*b.ties(written.spec)]
    if written.has_head:
        assert (a.head, a.head_tie) == (b.head, b.head_tie)


@pytest.mark.parametrize("family", pico.families(FAMILIES, tier=(*pico.TIER, "granite_swa", "deepseek_v3")))
def test_inferred_matrices_agree_with_the_written_record(family):
    written, inferred = both(family)
    for name, matrix in written.linears.items():
        other = inferred.linears[name]
        for key in ("block", "part", "transposed", "expert", "is_layer"):
            assert getattr(matrix, key) == getattr(other, key), (name, key)
        assert matrix.role == other.role, name
        assert written.in_memory(matrix.module) == inferred.in_memory(matrix.module)
    assert (written.record.packable, written.record.input_axis) == (
        inferred.record.packable,
        inferred.record.input_axis,
    )
    assert [x.name for x in written.targets] == [x.name for x in inferred.targets]
    present = {starred(x.part) for x in written.linears.values() if x.role == "router"}
    assert present == set(inferred.record.routers)


@pytest.mark.parametrize("family", pico.families(FAMILIES, tier=(*pico.TIER, "granite_swa", "deepseek_v3")))
def test_inferred_mlps_and_attention_agree_with_the_written_record(family):
    """The field of the config for the neurons is not inferred; fused queries, and the table of T5, are left out."""
    written, inferred = both(family)
    parts = {starred(matrix.part) for matrix in written.linears.values()}
    mlps = {
        replace(m, size_key=None, times=None) for m in written.record.mlps if {*map(starred, (*m.up, m.down))} <= parts
    }
    assert {*inferred.record.mlps} == mlps
    attention = written.record.attention
    if attention is None or attention.layout != "separate" or attention.table:
        assert inferred.record.attention is None
    else:
        free = inferred.record.head_dim_key is not None
        assert inferred.record.attention == replace(attention, free=free, even=False, rotary=False)


def test_every_written_family_is_tried():
    assert {record.model_type for record in architectures.RECORDS} == set(FAMILIES)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("cast", {"weights": "int8", "method": "rtn"}),
        ("prune_unstructured", {"method": "magnitude", "sparsity": 0.5}),
    ],
)
def test_passes_without_data_need_no_class(name, settings, tmp_path):
    """Tensors of a model type that transformers does not know become those of the same model under its own type."""
    known = pico.save(tmp_path / "known")
    pico.save(tmp_path / "unheard")
    edit_config(tmp_path / "unheard", model_type="unheard", architectures=["UnheardForCausalLM"])
    a = compress.apply(name, known, tmp_path / "a", **settings)
    b = compress.apply(name, tmp_path / "unheard", tmp_path / "b", **settings)
    first, second = open_checkpoint(a), open_checkpoint(b)
    assert any("does not know the model type" in note for note in second.spec.notes)
    assert first.spec.tensors == second.spec.tensors
    assert all(torch.equal(first.tensor(n).data, second.tensor(n).data) for n in first.spec.tensors)


@pytest.mark.parametrize(
    ("kind", "cls", "lost"),
    [
        ("gte", "GteForMaskedLM", "attention.qkv_proj"),  # three layers in memory, one in files
        # three convolutions in files, one in memory
        pytest.param("olmo_hybrid", "OlmoHybridForCausalLM", "linear_attn.a_proj", marks=pytest.mark.slow),
        # the same in two blocks
        pytest.param(
            "zamba2", "Zamba2ForCausalLM", "shared_transformer.feed_forward.down_proj", marks=pytest.mark.slow
        ),
    ],
)
def test_codes_that_transformers_cannot_load_are_refused_in_stock_files(kind, cls, lost, tmp_path):
    pico_model(getattr(transformers, cls), shrunken(default_config(kind))).save_pretrained(tmp_path / "model")
    settings = {"weights": "int8", "method": "rtn", "only": [f"re:.*{lost}$"]}
    with pytest.raises(PassError, match=rf"do not read int8 codes of .*{lost}.*use `store: compact`"):
        compress.apply("cast", tmp_path / "model", tmp_path / "stock", **settings)
    folder = compress.apply("cast", tmp_path / "model", tmp_path / "compact", store="compact", **settings)
    written = open_checkpoint(folder)
    before, after = compress.load(tmp_path / "model").state_dict(), compress.load(folder).state_dict()
    assert {t.module for t in written.spec.stored() if t.quant_format} == {
        t.module for t in written.spec.stored() if t.module.endswith(lost)
    }
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed
    assert all(torch.dist(before[name], after[name]) < 0.02 * before[name].norm() for name in changed)


def test_layers_that_files_join_are_absent_from_them(tmp_path):
    """A config of codes must name each of the three as plain."""
    pico_model(transformers.GteForMaskedLM, shrunken(default_config("gte"))).save_pretrained(tmp_path / "model")
    absent = infer(open_checkpoint(tmp_path / "model").spec).absent
    assert {name for name in absent if ".layers.0." in name} == {
        f"gte.layers.0.{part}_proj" for part in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")
    }


def test_a_list_of_parameters_beside_the_blocks_is_not_taken_for_them(tmp_path):
    """The files of Inkling 2 hold the queries of all blocks in lists of their own."""
    config = shrunken(default_config("inkling2_text"))
    pico_model(transformers.Inkling2ForCausalLM, config).save_pretrained(tmp_path / "model")
    mapped = ModelMap(open_checkpoint(tmp_path / "model").spec)
    assert [block.path for block in mapped.blocks] == [
        f"model.llm.layers.{i}." for i in range(config.num_hidden_layers)
    ]


def test_misfit_names_what_the_class_of_a_config_has_otherwise():
    spec = open_checkpoint(pico.folder("gpt2")).spec

    def with_config(**changes):
        return replace(spec, structure=replace(spec.structure, config={**spec.structure.config, **changes}))

    assert misfit(spec, spec) is None
    assert misfit(with_config(n_layer=3), spec) == "its class has no place for transformer.h.3.attn.c_attn.weight"
    assert (
        misfit(with_config(n_positions=32), spec)
        == "transformer.wpe.weight is [64, 32], and its class expects [32, 32]"
    )
    fewer = replace(spec, tensors={n: t for n, t in spec.tensors.items() if n != "transformer.ln_f.bias"})
    assert misfit(fewer, spec) == "its class also has transformer.ln_f.bias"


def test_convolutions_before_the_blocks_are_no_list_of_blocks(tmp_path):
    torch.manual_seed(0)
    config = shrunken(default_config("wav2vec2"))
    transformers.Wav2Vec2ForCTC(config).eval().save_pretrained(tmp_path)
    record = infer(open_checkpoint(tmp_path).spec)
    assert [(entry.path, entry.kind) for entry in record.lists] == [("wav2vec2.encoder.layers", "main")]


def test_a_larger_encoder_of_images_beside_the_text_is_a_tower(tmp_path):
    """GIT has one config for its text, and inside it that of its images."""
    model = pico_model(transformers.GitForCausalLM, shrunken(default_config("git")))
    model.save_pretrained(tmp_path)
    lists = infer(open_checkpoint(tmp_path).spec).lists
    assert [(entry.path.partition(".")[2], entry.kind) for entry in lists] == [
        ("encoder.layer", "main"),
        ("image_encoder.vision_model.encoder.layers", "tower"),
    ]


def test_a_gate_without_a_matrix_chooses_no_experts():
    """Kimi Linear's forget gates are no routers, whatever their class is called."""

    class ForgetGate(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.A_log = torch.nn.Parameter(torch.zeros(1, 1, 4, 1))

    class MoEGate(ForgetGate):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(8, 4))

    assert not is_router("self_attn.forget_gate", ForgetGate(), {8})
    assert is_router("mlp.choice", MoEGate(), {8})
