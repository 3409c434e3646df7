"""`cast: {scheme: …}`: each is what compressed-tensors calls by that name, and is written as planned."""

from __future__ import annotations

import re
from typing import get_args

import pytest
import torch
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES, QuantizationScheme
from safetensors.torch import load_file

import compress
from compress import passes
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.running import expert_note
from compress.checkpoint.storage.compressed_tensors.loaders import stock_holds
from compress.checkpoint.storage.compressed_tensors.write import render
from compress.checkpoint.values import Derived, Value
from compress.data.batches import Batches
from compress.errors import CompressError, RecipeError
from compress.passes.cast.schemes import SCHEMES, SchemeName, find, refusal
from compress.passes.cast.settings import CastSettings
from compress.planning import planned_size, size_on_disk
from compress.recipe import recipe_from_mapping, resolved
from tests import pico
from tests.toolbox import IDS, apply, our_logits, plan, stock_logits, write


def test_schemes_are_listed_once():
    assert list(SCHEMES) == [*get_args(SchemeName)]


@pytest.mark.parametrize("name", sorted(PRESET_SCHEMES))
def test_scheme_of_compressed_tensors_is_known_or_refused_with_one_that_is(name):
    if name in ("UNQUANTIZED", "INT8"):  # no scheme; another name of W8A8
        return
    if find(name) is None:
        assert str(refusal(name)).partition("use `scheme: ")[2].strip("`") in SCHEMES
    else:
        assert find(name.lower()) == name
        assert refusal(name) is None


SIZES = {"num_hidden_layers": 1, "hidden_size": 128, "head_dim": 32, "num_key_value_heads": 4, "intermediate_size": 256}


def test_configs_of_schemes_are_those_of_compressed_tensors():
    """What its presets serialise to, but for observers, which say how scales were found."""
    before = open_checkpoint(pico.folder("llama", dtype=torch.bfloat16, **SIZES))
    for name in SCHEMES:
        (group,) = render(plan(before, "cast", scheme=name))["config_groups"].values()
        for part in ("weights", "input_activations"):
            args = PRESET_SCHEMES[name].get(part)
            wanted = None if args is None else args.model_dump(mode="json")
            given = {"group_size": None, **group[part]} if group[part] else None
            assert given == (wanted and {k: v for k, v in wanted.items() if k != "observer"}), (name, part)
        assert QuantizationScheme.model_validate(group)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "W4A16_ASYM"])  # stock loaders read none of it
def test_scheme_is_written_as_planned_and_read_by_stock_transformers(name, tmp_path):
    """In a process without the package: its logits are ours, inputs quantised."""
    before = open_checkpoint(pico.folder("llama", dtype=torch.bfloat16, **SIZES))
    settings = {"scheme": name, "method": "rtn"}
    data = Batches(SAMPLES) if CastSettings(scheme=name).static_inputs else None
    written = write(apply(before, "cast", data=data, work=tmp_path / "work", **settings), tmp_path / "out")
    assert size_on_disk(written).bytes == planned_size(plan(before, "cast", **settings), "stock", 1 << 40).bytes
    logits = our_logits(tmp_path / "out")
    assert torch.equal(stock_logits(tmp_path / "out", tmp_path), logits)
    with torch.no_grad():
        dense = compress.load(tmp_path / "out", quantized_activations=False)(input_ids=IDS).logits.float()
    assert torch.equal(dense, logits) == (SCHEMES[name].activations is None)


def test_scheme_takes_smaller_groups_where_128_does_not_divide():
    before = open_checkpoint(pico.folder("llama", num_hidden_layers=1, hidden_size=64, intermediate_size=96))
    cast = plan(before, "cast", scheme="W4A16")
    assert {t.quant_format.group for t in cast.stored() if t.quant_format is not None} == {64, 32}


def test_scheme_leaves_overrides_their_own_groups():
    settings = CastSettings(scheme="W4A16", overrides={"*": "int8"})
    assert [settings.quant_format(f).group for f in ("int4", "int8")] == [128, 0]


def test_scheme_stays_when_resolved():
    data = {"calibration": {"files": ["text.txt"]}}
    mapping = {"model": "m", "output": "o", "data": data, "passes": [{"cast": {"scheme": "W8A8"}}]}
    recipe = recipe_from_mapping(mapping, check_files=False)
    assert resolved(recipe)["passes"][0]["cast"]["activations"] == "int8"
    assert recipe_from_mapping(resolved(recipe), check_files=False) == recipe


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": "W4A16", "weights": "int8"}, "`weights` is part of `scheme: W4A16`: leave one of both out"),
        ({"scheme": "W4A16", "symmetric": False}, "`symmetric` is part of `scheme: W4A16`"),
        ({"scheme": "W4A16", "bits": 3}, "give one of `scheme`, `weights`, `bits` and `max_bytes`"),
        ({"scheme": "NVFP4A16", "group_size": 128}, "nvfp4 has groups of 16: leave `group_size` out"),
    ],
)
def test_scheme_refuses_what_contradicts_it(settings, message):
    with pytest.raises(RecipeError, match=r"passes\.0: ") as caught:
        recipe_from_mapping({"model": "m", "output": "o", "passes": [{"cast": settings}]}, check_files=False)
    assert message in str(caught.value)


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    """Scheme ▶ a checkpoint with static scales of inputs, measured on `SAMPLES`."""
    root, base = tmp_path_factory.mktemp("static"), pico.folder("llama", dtype=torch.bfloat16, **SIZES)
    return {
        name: compress.apply("cast", base, root / name, data=SAMPLES, scheme=name, method="rtn", dtype="float32")
        for name in ("FP8", "NVFP4")
    }


SAMPLES = torch.randint(2, 250, (4, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["FP8", "NVFP4"])
def test_static_scales_are_those_of_the_largest_inputs(name, static, tmp_path):
    """As hooks on the whole model see them."""
    state = load_file(static[name] / "model.safetensors")
    model, largest = compress.load(compress.unpack(static[name], tmp_path / "dense"), dtype="float32"), {}

    def note(path):
        def hook(module, args):
            largest[path] = max(largest.get(path, 0), float(args[0].abs().max()))

        return hook

    for path, module in model.named_modules():
        if f"{path}.weight_scale" in state:
            module.register_forward_pre_hook(note(path))
    with torch.no_grad():
        model(input_ids=SAMPLES)
    assert len(largest) == 7
    for path, value in largest.items():
        if name == "FP8":
            assert float(state[f"{path}.input_scale"]) == pytest.approx(value / 448, rel=2**-8)  # in bfloat16
        else:
            assert float(state[f"{path}.input_global_scale"]) == pytest.approx(6 * 448 / value, rel=1e-5)


def test_matrices_that_servers_join_share_the_scale_of_nvfp4_scales():
    """The largest weight of any of them is the largest value of E2M1 times E4M3."""
    base, path = open_checkpoint(pico.folder("llama", dtype=torch.bfloat16, **SIZES)), "model.layers.0"
    larger = {f"{path}.self_attn.k_proj.weight": 4, f"{path}.mlp.up_proj.weight": 2}
    changed = Derived(base, base.spec, lambda name: Value(base.tensor(name).data * larger.get(name, 1)))
    cast = apply(changed, "cast", weights="nvfp4", method="rtn")
    scales = {t.module: float(cast.tensor(t.name).codes.overall) for t in cast.spec.stored() if t.quant_format}
    most = {module: float(changed.tensor(f"{module}.weight").data.abs().max()) for module in scales}
    joined = {"q_proj": "self_attn.k_proj", "v_proj": "self_attn.k_proj", "gate_proj": "mlp.up_proj"}
    for module, scale in scales.items():
        source = joined.get(module.rpartition(".")[2])
        if not module.endswith("o_proj"):  # it has as many inputs as they, by chance
            assert scale == pytest.approx(6 * 448 / most[f"{path}.{source}" if source else module]), module


def test_static_scales_need_calibration_data(tmp_path):
    base = pico.folder("llama", dtype=torch.bfloat16, **SIZES)
    with pytest.raises(CompressError, match="cast needs calibration data"):
        compress.apply("cast", base, tmp_path / "out", scheme="FP8", method="rtn")


def test_blocks_that_do_not_fit_fall_back_to_scales_by_output():
    """Inputs that 128 does not divide, and joined matrices whose outputs it does not divide, which servers refuse."""
    sizes = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 192}
    before = open_checkpoint(pico.folder("llama", dtype=torch.bfloat16, **sizes))
    cast, settings = plan(before, "cast", scheme="FP8_BLOCK"), CastSettings(scheme="FP8_BLOCK")
    by_token = {t.module.rpartition(".")[2] for t in cast.stored() if t.quant_format and not t.quant_format.block}
    assert by_token == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {t.quant_format.activations for t in cast.stored() if t.quant_format} == {"fp8"}
    assert (
        "blocks of 128 x 128 do not fit some matrices, which get one scale per output"
        in (passes.get("cast").plan_notes(before.spec, settings)[0])
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe"])
@pytest.mark.parametrize("name", ["W4A16", "W4A8", "W4AFP8", "FP8_DYNAMIC", "MXFP4"])
def test_experts_are_written_one_by_one_and_read_by_stock_transformers(name, family, tmp_path):
    """It fuses them, and rounds the inputs of the other layers alone."""
    more = {"moe_intermediate_size": 128} if family == "qwen3_moe" else {}
    before = open_checkpoint(pico.folder(family, dtype=torch.bfloat16, with_tokenizer=False, **{**SIZES, **more}))
    written = write(apply(before, "cast", scheme=name, method="rtn", work=tmp_path / "work"), tmp_path / "out")
    assert not written.spec.structure.compact
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert any(re.fullmatch(r"model\.layers\.0\..*experts\.3\.(down_proj|w2)\.weight(_packed)?", n) for n in names)
    assert torch.equal(stock_logits(tmp_path / "out", tmp_path), our_logits(tmp_path / "out"))
    assert (expert_note(written.spec) is None) == (SCHEMES[name].activations is None)


@pytest.mark.parametrize("name", ["W8A8", "FP8", "FP8_BLOCK", "NVFP4A16", "NVFP4", "MXFP8"])
def test_experts_that_stock_transformers_does_not_read_need_the_compact_store(name):
    more = {"moe_intermediate_size": 256}
    before = open_checkpoint(pico.folder("qwen3_moe", dtype=torch.bfloat16, with_tokenizer=False, **{**SIZES, **more}))
    spec = plan(before, "cast", scheme=name)
    holds = stock_holds(spec)
    assert not any(holds(t) for t in spec.stored() if t.quant_format and ".experts." in t.name)
