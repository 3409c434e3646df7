"""Changes of structure: models with factors, residuals and shared tensors compute what their dense twins do, everywhere."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import pytest
import torch

from compress import architectures
from compress.api import unpack
from compress.checkpoint.edits.base import alias
from compress.checkpoint.edits.factors import factored
from compress.checkpoint.edits.twin import dense
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.values import Derived, Value
from compress.checkpoint.write import write_checkpoint
from compress.errors import CheckpointError
from compress.models.loading import check_keys, load_checkpoint, load_model
from compress.models.sameness import same_logits
from compress.spec.spec import Edit
from tests import pico

FAMILIES = [
    "llama",
    "qwen3",
    "gemma3_text",
    "phi3",
    "gpt2",
    "bloom",
    "gpt_neox",
    "opt",
    "bert",
    "roberta",
    "distilbert",
]


def edited(folder):
    """A checkpoint with one matrix of block 1 as factors, three tensors of block 1 those of block 0, residuals beside one."""
    checkpoint = open_checkpoint(folder)
    spec = checkpoint.spec
    record = architectures.of(spec.structure.config)
    matrices = [t.name for t in spec.tensors.values() if len(t.shape) == 2 and record.block_index(t.name) is not None]
    own = [name for name in matrices if record.block_index(name) == 0]
    last = [name for name in matrices if record.block_index(name) == 1][-1]
    source = record.block_path(own[0])[0][:-1]
    target = record.block_path(record.renumber(own[0], 1))[0][:-1]
    parts = [record.block_path(name)[1] for name in own if record.renumber(name, 1) != last][:3]
    after = factored(spec, {last: 3})
    tensors, edits = dict(after.tensors), list(after.structure.edits)
    for path in (source, target):
        module = f"{path}.{parts[0].removesuffix('.weight')}"
        shape = spec.tensors[f"{module}.weight"].shape
        transposed = record.input_axis == 0
        outputs, inputs = shape[::-1] if transposed else shape
        edits.append(Edit("residual", module, {"rank": 2, "transposed": transposed}))
        for suffix, size in (("down", (2, inputs)), ("up", (outputs, 2))):
            name = f"{module}.residual_{suffix}.weight"
            tensors[name] = replace(spec.tensors[f"{module}.weight"], name=name, shape=size)
    edits.append(Edit("shared", target, {"source": source, "parts": parts}))
    for part in parts:
        tensors[f"{target}.{part}"] = alias(tensors[f"{source}.{part}"], f"{target}.{part}")
    after = replace(after, structure=replace(after.structure, edits=tuple(edits)), tensors=tensors)
    generator, made = torch.Generator().manual_seed(0), {}

    def read(name):
        if name in spec.tensors:
            return checkpoint.tensor(name)
        if name.endswith(".up.bias"):
            return checkpoint.tensor(name.replace(".up.bias", ".bias"))
        if name not in made:
            made[name] = torch.randn(after.tensors[name].shape, generator=generator) / 4
        return Value(made[name])

    return Derived(checkpoint, after, read)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Makes, of a family, (the edited checkpoint, the folder it was written to)."""
    root = tmp_path_factory.mktemp("edits")

    @functools.cache
    def make(family):
        checkpoint = edited(pico.save(root / family, family))
        write_checkpoint(checkpoint, root / f"{family}-small", store="compact")
        return checkpoint, root / f"{family}-small"

    return make


@pytest.mark.parametrize("family", pico.families(FAMILIES, tier=("phi3", "bloom", "bert")))
def test_edits_match_dense_twin(family, written, tmp_path):
    checkpoint, folder = written(family)
    stored = open_checkpoint(folder)
    check_keys(stored)
    same_logits(checkpoint, stored)
    assert stored.spec.tensors == checkpoint.spec.tensors
    assert stored.spec.structure == checkpoint.spec.structure
    model = load_model(folder)
    assert sum(p.numel() for p in model.parameters()) == stored.spec.parameters  # shared ones once
    twin = load_checkpoint(dense(stored))
    assert type(twin).__name__ == type(model).__name__
    assert sum(p.numel() for p in twin.parameters()) > stored.spec.parameters
    assert torch.allclose(pico.logits(model), pico.logits(twin), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    assert torch.allclose(pico.logits(load_model(tmp_path / "saved")), pico.logits(twin), rtol=1e-4, atol=1e-4)
    assert "auto_map" not in json.loads((tmp_path / "saved/config.json").read_text())


@pytest.mark.slow
def test_edits_load_and_generate_in_stock_transformers(written, stock, tmp_path):
    for family in ("llama", "gpt2", "gemma3_text"):
        unpack(written(family)[1], tmp_path / family)
    pairs = {family: [str(written(family)[1]), str(tmp_path / family)] for family in ("llama", "gpt2", "gemma3_text")}
    out = stock(
        "import torch, transformers\n"
        f"for small, dense in {list(pairs.values())!r}:\n"
        "    a = transformers.AutoModelForCausalLM.from_pretrained(small, trust_remote_code=True)\n"
        "    b = transformers.AutoModelForCausalLM.from_pretrained(dense)\n"
        "    ids = torch.arange(12)[None]\n"
        "    how = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False)\n"
        "    x, y = (m.generate(ids, **how) for m in (a, b))\n"
        "    z = a.generate(ids, use_cache=False, **how)\n"
        "    size = lambda m: sum(p.numel() for p in m.parameters())\n"
        "    print(torch.equal(x, y), torch.equal(x, z), size(a) < size(b), float((a(ids).logits - b(ids).logits).abs().max()))\n"
    )
    for line in out.splitlines():
        assert line.startswith("True True True "), out
        assert float(line.split()[-1]) < 1e-4


def test_edits_need_trust_remote_code(written, stock):
    out = stock(
        "import transformers\n"
        "try:\n"
        f"    transformers.AutoModelForCausalLM.from_pretrained({str(written('llama')[1])!r})\n"
        "except Exception as error:\n"
        "    print(type(error).__name__)\n"
    )
    assert out.split()[-1] in ("ValueError", "KeyError", "OSError")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda edits: edits[0].update(kind="magic"), "does not know: magic"),
        (lambda edits: edits[0]["values"].pop("rank"), "damaged edit"),
        (lambda edits: edits.append(7), "damaged `edits`"),
        (lambda edits: edits[0]["values"].update(rank="many"), "damaged edit: factors"),
        (lambda edits: edits[0]["values"].update(rank=-3), "damaged edit: factors"),
        (lambda edits: edits[0]["values"].update(rank=4), "down.weight, of rank 4, is "),
        (lambda edits: edits[1].update(module="model.layers.9.mlp"), "residual_down.weight, of rank 2, is missing"),
        (lambda edits: edits[-1]["values"].update(parts=3), "damaged edit: shared"),
        (lambda edits: edits[-1]["values"].update(source="model.layers.9"), "with model.layers.9"),
    ],
)
def test_edits_refuse_damage(change, message, written, tmp_path):
    import shutil

    shutil.copytree(written("llama")[1], tmp_path / "bad")
    config = json.loads((tmp_path / "bad/config.json").read_text())
    change(config["edits"])
    (tmp_path / "bad/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(tmp_path / "bad")
    assert "\n" not in str(error.value)
