"""What every static pass promises: the plan is exact, to the byte, and order of work does not matter."""

from __future__ import annotations

import pytest

from compress import architectures, passes
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.write import stored_form, write_checkpoint
from compress.errors import CompressError
from compress.models.blocks import find_blocks
from compress.models.loading import load_model
from tests import pico
from tests.toolbox import apply, bypass, plan, write

STATIC = [
    ("cast", {"weights": "bf16"}),
    ("cast", {"weights": "fp16", "overrides": {"*norm*": "fp32", "*ln_*": "fp32", "*LayerNorm*": "fp32"}}),
    ("prune_unstructured", {"method": "magnitude", "sparsity": 0.37}),
    ("prune_unstructured", {"method": "magnitude", "pattern": "2:4"}),
    ("prune_structured", {"layers": [1, 2], "compensation": "none"}),
    ("prune_structured", {"layers": [0], "compensation": "none"}),
]


def test_passes_are_named_after_their_folders():
    assert {"cast", "distill", "factorize", "prune_structured", "prune_unstructured", "share"} <= set(passes.names())
    assert all(passes.get(name).name == name for name in passes.TABLE)


def test_words_of_other_tools_name_passes():
    assert {name for meant in passes.WORDS.values() for name in meant} <= set(passes.TABLE)
    with pytest.raises(CompressError, match=r"no pass is called `swa`; did you mean `local_attention`\?"):
        passes.get("swa")


@pytest.mark.parametrize(
    ("store", "family"),
    [
        pytest.param(store, family, marks=[] if family in quick else [pytest.mark.slow])
        for store, quick in (
            ("stock", ("llama", "gpt2", "bert", "t5", "vit")),
            ("compact", ("gemma3_text", "phi3", "qwen3_moe")),
        )
        for family in pico.FAMILIES
    ],
)
@pytest.mark.parametrize(("name", "settings"), STATIC)
def test_plan_matches_what_every_pass_writes(family, name, settings, store, folders, tmp_path):
    if "layers" in settings and family not in pico.ONE_LIST:
        pytest.skip("no block can go by its number")
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
def test_fused_writes_match_separate_ones(store, scope, folders, tmp_path):
    steps = [
        ("prune_structured", {"layers": [2], "compensation": "none"}),
        ("prune_unstructured", {"method": "magnitude", "sparsity": 0.5, "scope": scope}),
        ("cast", {"weights": "fp16"}),
        ("prune_unstructured", {"method": "magnitude", "sparsity": 0.6, "scope": scope}),
    ]
    fused = separate = open_checkpoint(folders["llama"])
    for i, (name, settings) in enumerate(steps):
        fused = apply(fused, name, **settings)
        separate = write(apply(separate, name, **settings), tmp_path / f"stage{i}", store=store)
    together = write(fused, tmp_path / "fused", store=store)
    for file in ("model.safetensors", "config.json"):
        assert (together.folder / file).read_bytes() == (separate.folder / file).read_bytes()


@pytest.fixture(scope="module")
def dropped(request, folders, tmp_path_factory, stock_outputs):
    """Of the families of this run: blocks 0 and 2 dropped and written, beside the outputs of the original that bypasses them; all reloaded elsewhere."""
    root = tmp_path_factory.mktemp("dropped")
    families = [item.callspec.params["family"] for item in request.session.items if "dropped" in item.fixturenames]
    for family in families:
        folder = folders[family]
        write(apply(open_checkpoint(folder), "prune_structured", layers=[0, 2], compensation="none"), root / family)
        original = load_model(folder)
        bypass(original, (0, 2))
        pico.save_expected(original, root / f"{family}.pt")
    return root, stock_outputs({f: (pico.FAMILIES[f][0], root / f, root / f"{f}.pt") for f in families})


@pytest.mark.parametrize(
    "family", pico.families(pico.ONE_LIST, tier=("llama", "gemma3_text", "gpt_neox", "bert", "vit"))
)
def test_remove_layers_matches_bypassed_blocks(family, dropped):
    """The written model is the original with those blocks replaced by the identity, after a stock reload elsewhere."""
    root, outputs = dropped
    assert outputs[family].get("difference", 1) <= 1e-5, outputs[family]
    assert outputs[family]["numbers"] in ([0, 1], [])
    model = load_model(root / family)
    assert len(find_blocks(model, architectures.of(model.config.to_dict()))) == 2
