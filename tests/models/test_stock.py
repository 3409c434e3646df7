"""What the stock store writes of codes, stock transformers loads whole and computes as we do, for every family and format."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers

import compress
from compress import architectures, passes
from compress.architectures.model_map import model_map
from compress.checkpoint.open import open_checkpoint
from compress.errors import CheckpointError, PassError
from compress.models import stock as stock_loader
from compress.passes.cast.settings import CastSettings
from compress.planning import plan_pass
from tests import pico
from tests.toolbox import apply, write

FORMATS = {
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4", "group_size": 16},
    "int3": {"weights": "int3", "group_size": "channel"},
    "int2": {"weights": "int2", "group_size": 32},
    "fp8": {"weights": "fp8"},
    "mxfp4": {"weights": "mxfp4"},
    "nvfp4": {"weights": "nvfp4"},
    "w8a8": {"weights": "int8", "activations": "int8"},
    "fp8 inputs": {"weights": "fp8", "activations": "fp8"},
    "mixed": {"weights": "int4", "group_size": 16, "overrides": {"*.0.*": "int8", "*.1.*": "fp32"}},
    "cache": {"weights": "int8", "kv_cache": "fp8"},
}
#: Formats that compressed-tensors decodes to bfloat16, and fails to multiply with anything else.
NARROW = ("mxfp4", "nvfp4")


def cast_all(pairs, root):
    """Name ▶ (class, folder, inputs and outputs) of what the stock store takes of families in formats; the pairs it does not."""
    cases, refused = {}, set()
    for family, name in pairs:
        settings, dtype = FORMATS[name], torch.bfloat16 if name in NARROW else torch.float32
        source = open_checkpoint(pico.folder(family, with_tokenizer=False, dtype=dtype))
        try:
            plan_pass(source.spec, passes.get("cast"), CastSettings(method="rtn", **settings), "stock")
        except PassError:
            refused.add((family, name))
            continue
        out = write(apply(source, "cast", method="rtn", **settings), root / f"{family}-{name}")
        stock_loader.check_codes(out)
        pico.save_expected(compress.load(out.folder), expected := root / f"{family}-{name}.pt")
        cases[f"{family} {name}"] = (pico.FAMILIES[family][0], out.folder, expected)
    return cases, refused


def check_same(pairs, root, stock_outputs):
    """Run all cases in one process of stock transformers; the pairs that the store refuses."""
    cases, refused = cast_all(pairs, root)
    found = stock_outputs(cases, dtype="auto")
    assert {name: row["error"] for name, row in found.items() if "error" in row} == {}
    assert {name: row["difference"] for name, row in found.items() if not row["difference"] <= 1e-4} == {}
    assert len(found) + len(refused) == len(pairs)
    return refused


@pytest.mark.slow
def test_stock_loader_matches_ours_in_four_families(tmp_path, stock_outputs):
    """One in every format, three more in those that differ in names, arrays or inputs; the rest is slow."""
    some = [
        (f, name) for f in ("gpt_neox", "gemma3_text", "bert") for name in ("int4", "mxfp4", "w8a8", "mixed", "cache")
    ]
    pairs = [("llama", name) for name in FORMATS] + some
    assert check_same(pairs, tmp_path, stock_outputs) == {("bert", "cache")}


@pytest.mark.slow
def test_stock_loader_matches_ours_in_every_family_and_format(tmp_path, stock_outputs):
    pairs = [(family, name) for family in pico.FAMILIES for name in FORMATS]
    cacheless = {(f, "cache") for f in ("bert", "albert", "roberta", "electra", "distilbert", "t5", "vit")}
    conv1d = {("gpt2", name) for name in FORMATS}
    moes = ("mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3")
    experts = {(f, name) for f in moes for name in ("nvfp4", "w8a8", "mixed")}
    unpackable = {("t5", name) for name in ("int8", "int4", "int3", "int2", "mxfp4", "nvfp4", "mixed")}
    one_group = {("albert", "mixed")}  # all of its groups of blocks are named
    narrow = ("qwen2_moe", "minicpm3", "deepseek_v3")  # 24 and 12 inputs, which no group of 16 divides
    odd = {(f, name) for f in narrow for name in ("int4", "int2", "mxfp4", "nvfp4", "mixed")}
    refused = check_same(pairs, tmp_path, stock_outputs)
    assert refused == cacheless | conv1d | experts | unpackable | one_group | odd


@pytest.mark.slow
def test_stock_loader_matches_ours_in_another_dtype(tmp_path, stock):
    """Stock loaders decode linear layers in the dtype of the model, and experts in float32 (fp8) or in that of their scales.

    They leave experts in the latter, whatever is asked for: the values are compared, computed in one dtype.
    """
    cases = []
    for kept, asked in (("bfloat16", "float32"), ("float32", "bfloat16")):
        for family, name in (("qwen3_moe", "int4"), ("mixtral", "fp8"), ("mixtral", "int8"), ("llama", "int8")):
            source = open_checkpoint(pico.folder(family, with_tokenizer=False, dtype=getattr(torch, kept)))
            place = tmp_path / f"{family}-{name}-{kept}"
            out = write(apply(source, "cast", method="rtn", **FORMATS[name]), place)
            pico.save_expected(compress.load(out.folder, dtype=asked), expected := place.with_suffix(".pt"))
            cases.append((pico.FAMILIES[family][0], str(out.folder), str(expected), asked))
    printed = stock(
        "import torch, transformers\n"
        f"for name, folder, expected, asked in {cases!r}:\n"
        "    m = getattr(transformers, name).from_pretrained(folder, dtype=asked)\n"
        "    for p in m.parameters():\n"
        "        p.data = p.data.to(getattr(torch, asked)) if p.is_floating_point() else p.data\n"
        "    inputs, y = torch.load(expected)\n"
        "    with torch.no_grad():\n"
        "        print(float((m(**inputs)[0] - y).abs().max() / y.abs().max()))\n"
    )
    differences = [float(line) for line in printed.splitlines()]
    assert len(differences) == len(cases)
    assert [case for case, difference in zip(cases, differences, strict=True) if not difference <= 1e-5] == []


@pytest.mark.parametrize("family", pico.FAMILIES)
def test_records_match_names_in_memory(family):
    """Of every matrix in a file, against what transformers' own loader makes of its name."""
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = getattr(transformers, pico.FAMILIES[family][0])(pico.config(family))
    record = architectures.of(model.config.to_dict())
    names = {name: value for name, value in model.state_dict().items() if value.ndim == 2}
    for name in names:  # one at a time, so that each is known by what it becomes
        (stored,) = revert_weight_conversion(model, {name: torch.empty(2, 2)})
        module = stored.removesuffix(".weight")
        assert record.in_memory(module, type(model).__name__) == name.removesuffix(".weight")
        flat = module.removeprefix(f"{record.prefix.partition('.')[0]}.")
        if flat != module and record.block_index(f"{flat}.weight") is not None:
            assert record.in_memory(flat, type(model).__name__) == name.removesuffix(".weight")
            base = name.removesuffix(".weight").removeprefix(f"{model.base_model_prefix}.")
            assert {record.in_memory(m, type(model.base_model).__name__) for m in (flat, module)} == {base}


@pytest.fixture(scope="module")
def neox(tmp_path_factory):
    root = tmp_path_factory.mktemp("neox")
    return compress.apply("cast", pico.save(root / "in", "gpt_neox"), root / "out", weights="int8", method="rtn")


def said(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_ignored_modules_are_listed_by_name_in_memory(neox, tmp_path):
    assert {"lm_head", "embed_out", "gpt_neox.embed_in"} <= set(said(neox)["ignore"])
    mixed = {"weights": "int4", "group_size": 16, "overrides": {"*.0.*": "int8", "*.1.*.dense": "fp32"}}
    for family, dense in (("gpt_neox", "gpt_neox.layers.1.attention.dense"), ("vit", "vit.layers.1.attention.o_proj")):
        folder = pico.save(tmp_path / family, family, with_tokenizer=False)
        out = compress.apply("cast", folder, tmp_path / f"{family}-out", method="rtn", **mixed)
        assert len(said(out)["config_groups"]) == 2
        assert dense in said(out)["ignore"]


def test_stock_loader_refuses_config_with_file_names(neox, tmp_path):
    """By the records' names alone, and by the stock loader alone."""
    folder = shutil.copytree(neox, tmp_path / "old")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"].remove("lm_head")
    (folder / "config.json").write_text(json.dumps(config))
    opened = open_checkpoint(folder)
    stock_loader.check_codes(open_checkpoint(neox))
    with pytest.raises(
        CheckpointError, match=r"could not load lm_head: the config says that it is codes, and it is not"
    ):
        stock_loader.check_names(opened, said(folder))
    with pytest.raises(
        CheckpointError, match=r"stock transformers finds \d+ keys missing, such as lm_head.weight_packed"
    ):
        stock_loader.check_load(opened)


def _flat(state):
    return {name.removeprefix("transformer."): value for name, value in state.items()}


def _no_pooler(state):
    return {name: value for name, value in state.items() if ".pooler." not in f".{name}"}


@pytest.mark.parametrize(
    ("family", "class_name", "change", "blocks"),
    [
        pytest.param("bloom", "BloomForCausalLM", _flat, "h", marks=pytest.mark.slow),
        ("bert", "BertModel", _no_pooler, "encoder.layer"),
    ],
)
def test_stock_loader_takes_base_class_files(family, class_name, change, blocks, tmp_path):
    """Names in files that leave the prefix out, and a pooler that they leave out."""
    from safetensors.torch import load_file, save_file

    folder = pico.save(tmp_path / "in", family, class_name=class_name, with_tokenizer=False)
    weights = folder / "model.safetensors"
    save_file(change(load_file(weights)), weights, metadata={"format": "pt"})
    mixed = {f"{blocks}.0.*": "int8", f"{blocks}.1.*": "fp32"}
    settings = {"weights": "int4", "group_size": 16, "overrides": mixed}
    out = compress.apply("cast", folder, tmp_path / "out", method="rtn", **settings)
    model, info = getattr(transformers, class_name).from_pretrained(out, output_loading_info=True)
    assert all("pooler" in key for keys in info.values() for key in keys)
    torch.testing.assert_close(pico.logits(model), pico.logits(compress.load(out)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "family", ["gpt_neox", *(pytest.param(family, marks=pytest.mark.slow) for family in ("vit", "mixtral"))]
)
def test_names_in_memory_are_read_back_as_file_names(family, tmp_path):
    """As a file of another tool: without the metadata that only we write."""
    from safetensors.torch import load_file, save_file

    folder = pico.save(tmp_path / "in", family, with_tokenizer=False)
    settings = {"weights": "int4", "group_size": 16, "overrides": {"*attention*": "int8"}}
    out = compress.apply("cast", folder, tmp_path / "out", method="rtn", **settings)
    before = open_checkpoint(out)
    save_file(load_file(out / "model.safetensors"), out / "model.safetensors", metadata={"format": "pt"})
    assert {t.name: t.quant_format for t in open_checkpoint(out).spec.stored()} == {
        t.name: t.quant_format for t in before.spec.stored()
    }
    assert any(model_map(before.spec).in_memory(t.module) != t.module for t in before.spec.stored())
