"""`cast: {kv_cache: fp8}`: static scales from calibration data, written as servers read them, and what evaluation makes of them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache

import compress
from compress import planning
from compress.checkpoint.open import open_checkpoint
from compress.errors import PassError
from compress.recipe import recipe_from_mapping, resolved
from tests import pico
from tests.toolbox import write

IDS = torch.randint(2, 250, (6, 16), generator=torch.Generator().manual_seed(1))
SETTINGS = {"weights": "int8", "method": "rtn", "kv_cache": "fp8"}
HEADS, WIDTH = 2, 8


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return pico.save(tmp_path_factory.mktemp("cache") / "llama", "llama")


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    """Folders by kind of scales."""
    root = tmp_path_factory.mktemp("scaled")
    return {
        kind: compress.apply("cast", base, root / kind, data=IDS, kv_cache_scales=kind, **SETTINGS)
        for kind in ("tensor", "head", "none")
    }


def cached(folder):
    """Keys and values that stock code caches of the calibration ids, by block: [(keys, values)]."""
    with torch.no_grad():
        layers = compress.load(folder)(input_ids=IDS, use_cache=True).past_key_values.layers
    return [(layer.keys, layer.values) for layer in layers]


def scales(folder):
    found = load_file(folder / "model.safetensors")
    return {key: value for key, value in found.items() if key.endswith(("k_scale", "v_scale"))}


def scheme(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]


@pytest.mark.parametrize("kind", ["tensor", "head"])
def test_kv_cache_scales_match_largest_keys_and_values(made, kind):
    from compressed_tensors.quantization import QuantizationConfig

    found, expected = scales(made[kind]), {}
    for index, pair in enumerate(cached(made[kind])):
        for name, tensor in zip("kv", pair, strict=True):
            largest = tensor.abs().amax((0, 2, 3))
            scale = largest[:, None, None] if kind == "head" else largest.max()[None]
            expected[f"model.layers.{index}.self_attn.{name}_scale"] = scale / 448
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], rtol=1e-4) for name in expected)
    assert {tuple(s.shape) for s in found.values()} == {(HEADS, 1, 1) if kind == "head" else (1,)}
    config = json.loads((made[kind] / "config.json").read_text())
    said = QuantizationConfig.model_validate(config["quantization_config"]).kv_cache_scheme
    assert (said.strategy, said.dynamic) == ("attn_head" if kind == "head" else "tensor", False)


@pytest.mark.slow
def test_kv_cache_scales_follow_gptq_codes(base, tmp_path):
    settings = {
        "weights": "int3",
        "group_size": 8,
        "error_correction": [],
        "reconstruction_epochs": 0,
        "kv_cache": "fp8",
    }
    out = compress.apply("cast", base, tmp_path / "out", data=IDS, **settings)
    assert scheme(out)["dynamic"] is False
    key = cached(out)[3][0].abs().max() / 448
    assert torch.allclose(scales(out)["model.layers.3.self_attn.k_scale"], key[None], rtol=1e-4)
    original = cached(base)[3][0].abs().max() / 448
    assert not torch.allclose(key, original, rtol=1e-3)


def test_kv_cache_scheme_is_dynamic_without_scales(made):
    assert scheme(made["none"])["dynamic"] is True
    assert scales(made["none"]) == {}


def test_kv_cache_scales_load_in_stock_with_a_note(made, stock, tmp_path):
    """They are unexpected to it, nothing is missing, and it computes what `compress.load` gives."""
    folders = {kind: str(made[kind]) for kind in ("tensor", "head")}
    for kind, folder in folders.items():
        pico.save_expected(compress.load(folder), tmp_path / f"{kind}.pt")
    code = f"""
import json, torch, transformers
for kind, folder in {folders!r}.items():
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    inputs, expected = torch.load(f"{tmp_path}/{{kind}}.pt")
    with torch.no_grad():
        difference = float((model(**inputs).logits - expected).abs().max())
    print(json.dumps([difference, *(sorted(info[k]) for k in ("missing_keys", "mismatched_keys", "unexpected_keys"))]))
"""
    lines = [json.loads(line) for line in stock(code).splitlines() if line.startswith("[")]
    assert len(lines) == 2
    for difference, missing, mismatched, unexpected in lines:
        assert difference <= 1e-6
        assert (missing, mismatched) == ([], [])
        assert set(unexpected) <= set(scales(made["tensor"]))


class RoundingDelta(DynamicCache):
    """A cache that rounds what it is given: what our models are compared with."""

    def __init__(self, config, of_layer):
        super().__init__(config=config)
        self.of_layer = of_layer

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        rounded = []
        for tensor, scale in zip((key_states, value_states), self.of_layer(layer_idx), strict=True):
            codes = (tensor / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            rounded.append(codes.float() * scale)
        return super().update(*rounded, layer_idx, *args, **kwargs)


@pytest.mark.parametrize("kind", ["tensor", "head", "none"])
def test_kv_cache_scales_round_keys_and_values_in_evaluation(made, kind):
    """At once and step by step, as a cache of its own does; without being asked to, nothing is rounded."""
    found = scales(made[kind])

    def of_layer(index):
        names = (f"model.layers.{index}.self_attn.{name}_scale" for name in "kv")
        return tuple(found.get(name, torch.ones(1)) for name in names)

    plain, ours = compress.load(made[kind]), compress.load(made[kind], quantized_kv_cache=True)
    ids = IDS[:1]
    with torch.no_grad():
        expected = plain(input_ids=ids, past_key_values=RoundingDelta(plain.config, of_layer)).logits
        logits = ours(input_ids=ids, use_cache=False).logits
        assert torch.allclose(logits, expected, atol=1e-5)
        assert (plain(input_ids=ids).logits - logits).abs().max() > 1e-3
        output = ours(input_ids=ids[:, :5], use_cache=True)
        for place in range(5, ids.shape[1]):
            step = ids[:, place : place + 1]
            output = ours(input_ids=step, past_key_values=output.past_key_values, use_cache=True)
        assert torch.allclose(output.logits[:, -1], expected[:, -1], atol=1e-4)


@pytest.mark.parametrize("family", pico.families(["gemma2", "qwen3_moe", "bloom", "gpt_neox"], tier=("bloom",)))
def test_kv_cache_scales_of_other_families(family, tmp_path):
    """Sliding windows, norms of keys, attention of other shapes: with scales where servers read them."""
    base = pico.save(tmp_path / "base", family, with_tokenizer=False)
    out = compress.apply("cast", base, tmp_path / "out", data=IDS, **SETTINGS)
    found = scales(out)
    assert len(found) == (8 if family in ("gemma2", "qwen3_moe") else 0)

    def of_layer(index):
        names = (f"model.layers.{index}.self_attn.{name}_scale" for name in "kv")
        return tuple(found.get(name, torch.ones(1)) for name in names)

    plain, ours = compress.load(out), compress.load(out, quantized_kv_cache=True)
    with torch.no_grad():
        expected = plain(input_ids=IDS, past_key_values=RoundingDelta(plain.config, of_layer)).logits
        logits = ours(input_ids=IDS).logits
        assert torch.allclose(logits, expected, atol=1e-5)
        assert (plain(input_ids=IDS).logits - logits).abs().max() > 1e-3


def test_largest_cached_ignores_padding(base, tmp_path):
    """Masked tokens give no scales: those of padded samples are those of the same samples alone."""
    from compress.blockwise.inputs import Inputs
    from compress.data.batches import Batches
    from compress.passes.cast.kv_cache import largest_cached
    from compress.progress import SilentProgress
    from compress.workspace import Workspace

    def largest(ids, mask, name):
        batches = Batches(ids, mask)
        how = {
            "dtype": "float32",
            "device": "cpu",
            "progress": SilentProgress(),
            "seed": 0,
        }
        return largest_cached(
            open_checkpoint(base), Inputs(batches.values, batches.mask), workspace=Workspace(tmp_path / name), **how
        )

    mask = torch.ones(IDS.shape, dtype=torch.bool)
    mask[:, 10:] = False
    padded, cut = largest(IDS, mask, "padded"), largest(IDS[:, :10].contiguous(), None, "cut")
    assert torch.allclose(torch.tensor(padded), torch.tensor(cut), rtol=1e-4)
    assert not torch.allclose(torch.tensor(padded), torch.tensor(largest(IDS, None, "all")), rtol=1e-4)


def test_kv_cache_scales_survive_rewriting_and_unpack(made, tmp_path):
    again = write(open_checkpoint(made["head"]), tmp_path / "again")
    assert scheme(again.folder) == scheme(made["head"])
    assert all(torch.equal(scales(again.folder)[name], value) for name, value in scales(made["head"]).items())
    dense = compress.unpack(made["head"], tmp_path / "dense")
    assert scales(dense) == {}
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    a, b = (open_checkpoint(folder).spec for folder in (dense, made["head"]))
    assert a.parameters == b.parameters


@pytest.fixture
def recipe(base, texts, tmp_path):
    train, valid = texts

    def make(calibrated=True, family=base, **settings):
        data = {"evaluation": {"files": [str(valid)], "window": 32, "max_documents": 2}}
        if calibrated:
            data["calibration"] = {"files": [str(train)], "samples": 4, "length": 32}
        return {
            "model": str(family),
            "output": str(tmp_path / "out"),
            "document_separator": "<|doc|>",
            "data": data,
            "passes": [{"cast": {**SETTINGS, **settings}}],
        }

    return make


def planned(values):
    loaded = recipe_from_mapping(values)
    stored = open_checkpoint(loaded.model)
    return loaded, planning.make_plan(loaded, stored.spec, stored.metadata).stages[0].passes[0]


def test_kv_cache_scales_are_default_with_calibration_data(recipe):
    for changes, kind in (({}, "tensor"), ({"calibrated": False}, "none"), ({"kv_cache_scales": "head"}, "head")):
        loaded, plan = planned(recipe(**changes))
        entry = loaded.passes[0]
        assert entry.settings.kv_cache_scales == kind
        assert resolved(loaded)["passes"][0]["cast"]["kv_cache_scales"] == kind
        assert plan.spec.structure.kv_cache == ("fp8" if kind == "none" else f"fp8-{kind}")
        assert len(plan.notes) == (kind == "none")
    assert "vLLM takes 1, SGLang does not quantise" in planned(recipe(calibrated=False))[1].notes[0]


def test_kv_cache_scales_are_off_in_families_without_readers(recipe, tmp_path):
    family = pico.save(tmp_path / "neox", "gpt_neox")
    _, plan = planned(recipe(family=family))
    assert plan.spec.structure.kv_cache == "fp8"
    assert "no calibrated scales" in plan.notes[0]
    with pytest.raises(PassError, match=r"servers read no scales of gpt_neox's cache"):
        planned(recipe(family=family, kv_cache_scales="head"))


def test_kv_cache_run_matches_plan_and_notes_rounding(recipe):
    values = recipe()
    result = compress.run(values)
    row = result.report["stages"][0]["passes"][0]
    assert row["planned"] == row["actual"]
    assert row["exact"]
    evaluation = result.report["result"]["evaluation"]
    before, after = (result.report[side]["size"]["kv_bytes_per_token"] for side in ("original", "result"))
    assert (before, after) == (2 * 4 * HEADS * WIDTH * 4, 2 * 4 * HEADS * WIDTH)
    assert evaluation["emulated"]["kv_cache"] == "fp8 (static scales, one per layer)"
    assert "keys and values in fp8 (static scales, one per layer)" in (result.checkpoint / "README.md").read_text()
    assert "a scale per layer" in row["details"]["cached keys and values"]
    values["data"]["evaluation"]["quantized_kv_cache"] = False
    without = compress.run(values, fresh=False).report["result"]["evaluation"]
    assert without["emulated"] is None
    assert without["kl"] != evaluation["kl"]
