"""The map of a model agrees with the model that stock transformers builds of the same files."""

from __future__ import annotations

from dataclasses import replace

import pytest

import compress
from compress.architectures.model_map import model_map
from compress.checkpoint.edits.factors import factored
from compress.checkpoint.edits.projected import projected
from compress.checkpoint.edits.shared import shared
from compress.checkpoint.open import open_checkpoint
from compress.errors import CompressError
from compress.models.loading import load_model
from tests import pico
from tests.toolbox import edit_config


def spec_of(family):
    return open_checkpoint(pico.folder(family)).spec


@pytest.mark.parametrize("family", pico.families())
def test_model_map_inputs_and_outputs_match_modules(family):
    folder = pico.folder(family)
    modules = dict(load_model(folder).named_modules())
    mapped = model_map(open_checkpoint(folder).spec)
    layers = [linear for linear in mapped.layers if linear.expert is None]
    assert layers
    for linear in layers:
        module = modules[mapped.in_memory(linear.module)]
        sizes = (module.out_features, module.in_features) if hasattr(module, "in_features") else (module.nf, module.nx)
        assert sizes == (linear.O, linear.I), linear.name
        assert linear.transposed == (not hasattr(module, "in_features"))


@pytest.mark.parametrize("family", pico.families())
def test_model_map_places_every_tensor_once(family):
    spec = spec_of(family)
    mapped = model_map(spec)
    assert {block.index for block in mapped.blocks} == set(range(mapped.depth))
    for block in mapped.blocks:
        assert {"attention", "mlp"} <= {linear.role for linear in block.linears}
        assert all(spec.tensors[block.path + part] is tensor for part, tensor in block.tensors.items())
    inside = [tensor.name for block in mapped.blocks for tensor in block.stored()]
    assert sorted([*inside, *(t.name for t in mapped.outside)]) == sorted(t.name for t in spec.stored())


def test_model_map_numbers_experts_and_leaves_routers_out():
    mapped = model_map(spec_of("qwen3_moe"))
    experts = {linear.expert for linear in mapped.layers}
    assert experts == {None, *range(mapped.record.value(mapped.config, mapped.record.experts_key))}
    routers = [linear for linear in mapped.linears.values() if linear.role == "router"]
    assert {x.block for x in routers} == {x.block for x in mapped.layers if x.expert is not None}
    assert not any(linear.is_layer for linear in routers)


def test_model_map_names_embedding_and_head():
    mapped = model_map(spec_of("gpt_neox"))
    roles = {linear.module: linear.role for linear in mapped.linears.values() if linear.block is None}
    assert roles == {"gpt_neox.embed_in": "embedding", "embed_out": "head"}
    assert mapped.embedding == "gpt_neox.embed_in.weight"


def test_model_map_gives_edited_matrices_their_roles():
    spec = spec_of("gpt2")
    mapped = model_map(spec)
    name = mapped.targets[0].name
    factors = [x for x in model_map(factored(spec, {name: 2})).linears.values() if x.role == "factor"]
    assert [(x.O, x.I, x.transposed) for x in factors] == [
        (2, mapped.linears[name].I, False),
        (mapped.linears[name].O, 2, False),
    ]
    both = model_map(shared(spec, [[0, 1]], ["attn.c_attn.weight"], 2))
    assert both.linears[both.blocks[1].path + "attn.c_attn.weight"].shared_with == name
    assert {x.role for x in both.layers} - {x.role for x in both.targets} == {"residual"}
    thin = model_map(projected(spec, [str(mapped.embedding)], 2))
    assert [x.role for x in thin.linears.values()].count("projection") == 1


def test_model_map_is_cached_per_spec():
    spec = spec_of("llama")
    assert model_map(spec) is model_map(spec)
    assert model_map(replace(spec)) is not model_map(spec)


def test_model_map_reads_shapes_of_an_unheard_model_type():
    spec = spec_of("llama")
    other = replace(spec, structure=replace(spec.structure, config={**spec.structure.config, "model_type": "unheard"}))
    mapped, known = model_map(other), model_map(spec)
    assert mapped.record.source == "shapes"
    assert [block.path for block in mapped.blocks] == [block.path for block in known.blocks]
    assert [x.name for x in mapped.targets] == [x.name for x in known.targets]
    assert (mapped.embedding, mapped.record.head_tie) == (known.embedding, "lm_head.weight")


def test_shapes_tell_tables_of_distances_routers_and_gates():
    """Of an unheard model type: biases of positions and routers are no linear layers, a gate of a plain MLP is one."""

    def unheard(family, rename=lambda name: name):
        spec = spec_of(family)
        tensors = {rename(name): replace(t, name=rename(name)) for name, t in spec.tensors.items() if not t.alias_of}
        config = {**spec.structure.config, "model_type": "unheard"}
        return model_map(replace(spec, structure=replace(spec.structure, config=config), tensors=tensors))

    for family in ("t5", "mixtral", "qwen3_moe"):
        assert {x.name for x in unheard(family).targets} == {x.name for x in model_map(spec_of(family)).targets}
    routers = unheard("mixtral", lambda name: name.replace("block_sparse_moe.gate", "moe.router.classifier"))
    assert not [x.name for x in routers.targets if "router" in x.name]
    gates = unheard("llama", lambda name: name.replace("gate_proj", "gate"))
    assert len([x for x in gates.targets if x.name.endswith("mlp.gate.weight")]) == gates.depth


def test_an_evaluation_of_an_unheard_model_type_is_refused_when_planned(tmp_path):
    """Nothing builds the model, which a run would find out behind its passes."""
    folder = pico.save(tmp_path / "in", "llama")
    edit_config(folder, model_type="unheard")
    (tmp_path / "text.txt").write_text("some text")
    recipe = {
        "model": str(folder),
        "output": str(tmp_path / "out"),
        "data": {"evaluation": {"files": [str(tmp_path / "text.txt")], "window": 16}},
        "passes": [{"cast": {"weights": "int8", "method": "rtn"}}],
    }
    with pytest.raises(
        CompressError, match=r"no class .* type `unheard`.*leave out `data.evaluation`, or set `evaluate"
    ):
        compress.plan(recipe)
    compress.plan(recipe | {"evaluate": []})
