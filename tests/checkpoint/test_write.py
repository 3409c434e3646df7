"""Reading and writing checkpoints: same values, same bytes, loads elsewhere."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compress.checkpoint.layout import lay_out
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.values import Derived, Value
from compress.checkpoint.write import stored_form, write_checkpoint
from compress.errors import CheckpointError, OutputError
from compress.models.loading import check_keys, load_model
from compress.models.processors import load_tokenizer
from compress.spec.classes import auto_class
from tests import pico
from tests.toolbox import prune


@pytest.fixture(scope="module")
def rewritten(request, tmp_path_factory, stock_outputs):
    """Families of this run written again as they are (``stock``) and pruned (``compact``), loaded where this package is not."""
    root = tmp_path_factory.mktemp("families")
    cases: dict[str, dict] = {"stock": {}, "compact": {}}
    users = [item for item in request.session.items if "rewritten" in item.fixturenames]
    for params in (item.callspec.params for item in users):
        family, store = params["family"], params["store"]
        name, _ = pico.FAMILIES[family]
        source, out = open_checkpoint(pico.folder(family)), root / f"{family}-{store}"
        write_checkpoint(source if store == "stock" else prune(source, sparsity=0.6), out, store=store)
        pico.save_expected(load_model(out), root / f"{family}-{store}.pt")
        loader = name if store == "stock" else auto_class(name)
        cases[store][family] = (loader, out, root / f"{family}-{store}.pt")
    outputs = {
        "stock": stock_outputs(cases["stock"]),
        "compact": stock_outputs(cases["compact"], trust_remote_code=True),
    }
    return root, outputs


@pytest.mark.parametrize(
    ("family", "store"),
    [
        pytest.param(family, store, marks=[] if family in quick else [pytest.mark.slow])
        for store, quick in (
            ("stock", ("llama", "gpt2", "qwen3_moe", "t5", "vit")),
            ("compact", ("gemma3_text", "phi3", "gpt_neox", "bert")),
        )
        for family in pico.FAMILIES
    ],
)
def test_write_checkpoint_loads_in_stock_with_our_logits(family, store, rewritten):
    root, outputs = rewritten
    found = outputs[store][family]
    assert found.get("difference", 1) <= 1e-6, found  # alignment of memory picks the kernel
    assert found["class"] == pico.FAMILIES[family][0]
    out = open_checkpoint(root / f"{family}-{store}")
    check_keys(out)
    model = load_model(out.folder)
    buffers = [b for name, b in model.named_buffers() if name in out.spec.tensors]  # a router's biases in DeepSeek-V3
    assert out.spec.parameters == sum(p.numel() for p in [*model.parameters(), *buffers])
    if store == "stock":
        assert torch.allclose(pico.logits(model), pico.logits(pico.model(family)), atol=1e-6)


def test_write_checkpoint_reads_and_writes_shards(tmp_path):
    folder = pico.save(tmp_path / "in", max_shard_size="60KB")
    assert (folder / "model.safetensors.index.json").exists()
    source = open_checkpoint(folder)
    written = write_checkpoint(source, tmp_path / "out", max_shard=50_000)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].startswith("model-00001-of-")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert torch.equal(opened.get_tensor(name), source.tensor(name).data)
    assert written.bytes == sum((tmp_path / "out" / f).stat().st_size for f in files)
    assert torch.equal(pico.logits(load_model(folder)), pico.logits(load_model(tmp_path / "out")))


def test_write_checkpoint_bytes_do_not_depend_on_input_shards(tmp_path):
    whole = pico.save(tmp_path / "whole")
    shards = pico.save(tmp_path / "shards", max_shard_size="60KB")
    for name, folder in (("a", whole), ("b", shards)):
        write_checkpoint(open_checkpoint(folder), tmp_path / name)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_stored_form_matches_what_is_written(tmp_path, pico_llama):
    pruned = prune(open_checkpoint(pico_llama), sparsity=0.5)
    for store in ("stock", "compact"):
        written = write_checkpoint(pruned, tmp_path / store, store=store, max_shard=40_000)
        _, layout = stored_form(pruned.spec, store, 40_000, pruned.metadata)
        assert layout.bytes == written.bytes
        for shard in layout.shards:
            assert (tmp_path / store / shard.file).stat().st_size == shard.bytes


@pytest.mark.parametrize(
    "dtype", [torch.float32, *(pytest.param(each, marks=pytest.mark.slow) for each in (torch.bfloat16, torch.float16))]
)
def test_compact_store_loads_in_stock_with_our_logits(dtype, tmp_path, stock):
    folder = pico.save(tmp_path / "in", dtype=dtype)
    write_checkpoint(prune(open_checkpoint(folder), sparsity=0.6), tmp_path / "out", store="compact")
    assert (tmp_path / "out/model.safetensors").stat().st_size < 0.85 * (folder / "model.safetensors").stat().st_size
    torch.save(pico.logits(load_model(tmp_path / "out", dtype="float32")), tmp_path / "expected.pt")
    out = stock(
        "import torch, transformers\n"
        f"m = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r}, trust_remote_code=True, dtype=torch.float32)\n"
        "x = m(input_ids=(torch.arange(12) * 7 % 250)[None])[0]\n"
        f"assert torch.equal(x, torch.load({str(tmp_path / 'expected.pt')!r}))\n"
        "print(type(m).__module__, len(m.generate(torch.tensor([[1, 2]]), max_new_tokens=3, do_sample=False)[0]))\n"
        "try:\n"
        f"    transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r}, trust_remote_code=False)\n"
        "except ValueError as error:\n"
        "    print('refused')\n"
    )
    assert out.splitlines() == ["transformers.models.llama.modeling_llama 5", "refused"]


@pytest.mark.slow
def test_compact_store_wraps_base_classes_and_classifiers(tmp_path, stock_outputs):
    import transformers

    torch.manual_seed(0)
    classifier = transformers.BertForSequenceClassification(pico.config("bert", num_labels=3))
    classifier.save_pretrained(tmp_path / "classifier")
    classifier.bert.save_pretrained(tmp_path / "base")
    transformers.T5EncoderModel(pico.config("t5")).save_pretrained(tmp_path / "half")  # AutoModel would take T5Model
    autos = {"classifier": "AutoModelForSequenceClassification", "base": "AutoModel", "half": "AutoModel"}
    cases = {}
    for name, auto in autos.items():
        out, expected = tmp_path / f"{name}-out", tmp_path / f"{name}.pt"
        write_checkpoint(prune(open_checkpoint(tmp_path / name), sparsity=0.6), out, store="compact")
        pico.save_expected(load_model(out), expected)
        cases[name] = (auto, out, expected)
    found = stock_outputs(cases, trust_remote_code=True)
    assert all(row.get("difference", 1) <= 1e-6 for row in found.values()), (
        found
    )  # alignment of memory picks the kernel


def test_write_checkpoint_keeps_masks_in_dense_files(tmp_path, pico_llama):
    """Kept weights that are exactly zero stay kept: the mask is not `value != 0`."""
    base = open_checkpoint(pico_llama)
    name = "model.layers.0.mlp.up_proj.weight"

    def with_zeros(key: str) -> Value:
        value = base.tensor(key)
        if key == name:
            value.data[0, :10] = 0
        return value

    zeroed = Derived(base, base.spec, with_zeros)
    kept = torch.zeros(64, 32, dtype=torch.bool)
    kept[:, :16] = True
    spec = replace(base.spec, tensors={**base.spec.tensors, name: replace(base.spec.tensors[name], kept=64 * 16)})
    masked = Derived(zeroed, spec, lambda key: Value(zeroed.tensor(key).data, kept if key == name else None))
    for store in ("stock", "compact"):
        write_checkpoint(masked, tmp_path / store, store=store)
        read = open_checkpoint(tmp_path / store)
        assert read.spec.tensors[name].kept == 64 * 16
        value = read.tensor(name)
        assert torch.equal(value.mask, kept)
        assert torch.equal(value.data, torch.where(kept, zeroed.tensor(name).data, 0))
    stock_file = load_file(tmp_path / "stock/model.safetensors")
    assert stock_file[name].shape == (64, 32)


def test_write_checkpoint_again_changes_nothing(tmp_path, pico_llama):
    pruned = prune(open_checkpoint(pico_llama), sparsity=0.5)
    for store in ("stock", "compact"):
        first = write_checkpoint(pruned, tmp_path / f"{store}1", store=store)
        second = write_checkpoint(open_checkpoint(tmp_path / f"{store}1"), tmp_path / f"{store}2", store=store)
        a, b = (tmp_path / f"{store}{i}/model.safetensors" for i in (1, 2))
        assert a.read_bytes() == b.read_bytes()
        assert first.content == second.content


def test_write_checkpoint_copies_sidecars(tmp_path):
    folder = pico.save(tmp_path / "in")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("licence")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"stale")
    (folder / "custom.py").write_text("# code")
    write_checkpoint(open_checkpoint(folder), tmp_path / "out")
    for name in (
        "chat_template.jinja",
        "LICENSE",
        "1_Pooling/config.json",
        "custom.py",
        "tokenizer.json",
        "generation_config.json",
    ):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert not (tmp_path / "out/pytorch_model.bin").exists()
    assert load_tokenizer(tmp_path / "out").decode([66, 67]) == load_tokenizer(folder).decode([66, 67])


def test_write_checkpoint_keeps_metadata_and_dtype_strings(tmp_path, pico_llama):
    from safetensors.torch import save_file

    folder = tmp_path / "in"
    folder.mkdir()
    for path in pico_llama.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    save_file(
        load_file(pico_llama / "model.safetensors"), folder / "model.safetensors", {"format": "pt", "note": "mine"}
    )
    write_checkpoint(open_checkpoint(folder), tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "note": "mine"}


def test_write_checkpoint_refuses_existing_output(tmp_path, pico_llama):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        write_checkpoint(open_checkpoint(pico_llama), tmp_path / "out")


def test_write_checkpoint_leaves_nothing_when_it_fails(tmp_path, pico_llama):
    base = open_checkpoint(pico_llama)

    def broken(name: str) -> Value:
        if name == "model.norm.weight":
            raise CheckpointError("no")
        return base.tensor(name)

    with pytest.raises(CheckpointError):
        write_checkpoint(Derived(base, base.spec, broken), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_write_checkpoint_verification_notices_a_wrong_byte(tmp_path, pico_llama, monkeypatch):
    from compress.checkpoint import write

    real = write._pwrite
    monkeypatch.setattr(
        write,
        "_pwrite",
        lambda fd, data, offset: real(fd, b"\x01" + bytes(data)[1:] if offset > 10_000 else data, offset),
    )
    with pytest.raises(CheckpointError, match="does not read back"):
        write_checkpoint(open_checkpoint(pico_llama), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_open_checkpoint_reads_ties_as_aliases(tmp_path):
    folder = pico.save(tmp_path / "in", tie_word_embeddings=True)
    spec = open_checkpoint(folder).spec
    assert spec.tensors["lm_head.weight"].alias_of == "model.embed_tokens.weight"
    assert spec.parameters == sum(p.numel() for p in load_model(folder).parameters())
    assert "lm_head.weight" not in {key for shard in lay_out(spec, 1 << 40).shards for key in shard.entries}


WEIGHTS = "model.safetensors"


def test_write_checkpoint_refuses_nan_weights(folder, tmp_path):
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"tensor model.layers.2.mlp.up_proj.weight has 1 NaN values"):
        write_checkpoint(open_checkpoint(folder), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_write_checkpoint_takes_infinities(folder, tmp_path):
    tensors = load_file(folder / WEIGHTS)
    tensors["model.norm.weight"][:2] = torch.tensor([float("inf"), float("-inf")])
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    write_checkpoint(open_checkpoint(folder), tmp_path / "out")
