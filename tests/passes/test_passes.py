"""What every static pass promises: the plan is exact, to the byte, and order of work does not matter."""

from __future__ import annotations

import pytest
import torch

from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.write import stored_form, write_checkpoint
from compress.loading import load_model
from tests import pico
from tests.passes.helpers import apply, plan, write

STATIC = [
    ("cast", {"weights": "bf16"}),
    ("cast", {"weights": "fp16", "overrides": {"*norm*": "fp32", "*ln_*": "fp32", "*LayerNorm*": "fp32"}}),
    ("prune_unstructured", {"sparsity": 0.37}),
    ("prune_unstructured", {"pattern": "2:4"}),
    ("prune_structured", {"layers": [1, 2]}),
    ("prune_structured", {"layers": [0]}),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {family: pico.save(root / family, family, with_tokenizer=False) for family in pico.FAMILIES}


@pytest.mark.parametrize("family", pico.FAMILIES)
@pytest.mark.parametrize(("name", "settings"), STATIC)
@pytest.mark.parametrize("store", ["stock", "compact"])
def test_planned_is_written(family, name, settings, store, folders, tmp_path):
    checkpoint = open_checkpoint(folders[family])
    if "overrides" in settings:
        modules = " ".join(t.module for t in checkpoint.spec.stored())
        used = {p: f for p, f in settings["overrides"].items() if p.strip("*") in modules}
        settings = {**settings, "overrides": used}
    planned = plan(checkpoint, name, **settings)
    assert planned.exact
    spec, layout = stored_form(planned, store, 50_000, checkpoint.metadata)
    written = write_checkpoint(apply(checkpoint, name, **settings), tmp_path / "out", store=store, max_shard=50_000)
    read = open_checkpoint(tmp_path / "out")
    assert {s.file: s.bytes for s in layout.shards} == {f: (tmp_path / "out" / f).stat().st_size for f in read.files}
    assert dict(read.spec.tensors) == dict(spec.tensors)
    assert read.spec.structure.config == planned.structure.config
    assert written.bytes == layout.bytes
    if layout.index() is not None:
        assert (tmp_path / "out/model.safetensors.index.json").read_bytes() == layout.index()


@pytest.mark.parametrize("store", ["stock", "compact"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_one_write_or_three_give_the_same_bytes(store, scope, folders, tmp_path):
    steps = [
        ("prune_structured", {"layers": [2]}),
        ("prune_unstructured", {"sparsity": 0.5, "scope": scope}),
        ("cast", {"weights": "fp16"}),
        ("prune_unstructured", {"sparsity": 0.6, "scope": scope}),
    ]
    fused = separate = open_checkpoint(folders["llama"])
    for i, (name, settings) in enumerate(steps):
        fused = apply(fused, name, **settings)
        separate = write(apply(separate, name, **settings), tmp_path / f"stage{i}", store=store)
    together = write(fused, tmp_path / "fused", store=store)
    for file in ("model.safetensors", "config.json"):
        assert (together.folder / file).read_bytes() == (separate.folder / file).read_bytes()


@pytest.mark.parametrize("family", pico.FAMILIES)
def test_dropping_blocks_equals_bypassing_them(family, folders, tmp_path, stock):
    """The written model is the original with those blocks replaced by the identity, after a stock reload elsewhere."""
    out = write(apply(open_checkpoint(folders[family]), "prune_structured", layers=[0, 2]), tmp_path / "out")
    original = load_model(folders[family])
    from compress import architectures
    from compress.calibration.influence import find_blocks

    blocks = find_blocks(original, architectures.of(original.config.to_dict()))
    for i in (0, 2):
        blocks[i].forward = lambda hidden_states, *args, **kwargs: hidden_states
    torch.save(pico.logits(original), tmp_path / "expected.pt")
    assert len(find_blocks(load_model(out.folder), architectures.of(out.spec.structure.config))) == 2
    stock(
        "import torch, transformers\n"
        f"m, info = transformers.{pico.FAMILIES[family][0]}.from_pretrained({str(tmp_path / 'out')!r}, output_loading_info=True)\n"
        "assert not any(info.values()), info\n"
        "x = m(input_ids=(torch.arange(12) * 7 % 250)[None])[0]\n"
        f"y = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        "assert (x - y).abs().max() <= 1e-5 * y.abs().max(), (x - y).abs().max()\n"
        "assert all(b.self_attn.layer_idx == i for i, b in enumerate(m.model.layers)) if hasattr(m, 'model') and hasattr(m.model, 'layers') else True\n"
    )
