"""Parameter sharing: equal blocks share at no cost, order of units changes nothing, files and memory hold shared tensors once."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers

import compress
from compress.api import unpack
from compress.architectures.model_map import model_map
from compress.blockwise.saved_hessians import SavedHessians
from compress.checkpoint.open import open_checkpoint
from compress.errors import CompressError, PassError
from compress.models.loading import load_model
from compress.passes.share.groups import shared_parts
from compress.passes.share.settings import ShareSettings
from compress.passes.share.solve import ShareOptions, Solver
from compress.workspace import Workspace
from tests import pico
from tests.toolbox import divergence

IDS = torch.randint(0, 250, (16, 24), generator=torch.Generator().manual_seed(0))
#: Every kind of layout: separate, stacked and interleaved projections, Conv1D, biases, grouped keys, heads that are ordered.
FAMILIES = ["llama", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox", "bloom", "opt", "bert", "roberta", "distilbert"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("share")
    return {family: pico.save(root / family, family) for family in FAMILIES}


def share(folder, out, **settings):
    """Without residuals, which at these widths would save nothing, unless they are asked for."""
    if "groups" in settings:
        settings = {"residual_rank": 0, **settings}
    return compress.apply("share", folder, out, store="compact", data=IDS, **settings)


class Shuffled(Solver):
    """Puts units into an order that has nothing to do with what they are."""

    def orders(self, first, other):
        generator = torch.Generator().manual_seed(10 * first + other)
        return [torch.randperm(units.count, generator=generator).tolist() for units in self.units[other]]


@pytest.mark.parametrize("family", FAMILIES)
def test_permuted_units_compute_the_same(family, folders, tmp_path):
    checkpoint = open_checkpoint(folders[family])
    solver = Shuffled(checkpoint, SavedHessians(Workspace(tmp_path / "none"), "cpu"), ShareOptions([], "mean", True, 0))
    assert all(len(units) == (1 if family == "bloom" else 2) for units in solver.units.values())
    read = solver.read_solved([[0, 1], [2, 3]], Workspace(tmp_path))
    model = load_model(folders[family])
    before, moved = pico.logits(model), 0
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if solver.map.record.block_index(name) is not None:
                moved += not torch.equal(value, read(name))
                value.copy_(read(name))
    assert moved >= 4
    assert torch.allclose(pico.logits(model), before, rtol=1e-4, atol=1e-5)


def twins(family, folder):
    """A model whose blocks 0 and 1, and 2 and 3, compute the same with their units in different orders."""
    checkpoint = open_checkpoint(folder)
    solver = Shuffled(checkpoint, SavedHessians(Workspace(folder / "none"), "cpu"), ShareOptions([], "mean", True, 0))
    model = load_model(folder)
    with torch.no_grad():
        state = model.state_dict()
        for name in list(state):
            index = solver.map.record.block_index(name)
            if index in (1, 3):
                source = solver.map.record.renumber(name, index - 1)
                data = solver._ordered(source, checkpoint.tensor(source).data, index - 1, index)
                state[name].copy_(data.T if data.ndim == 2 and solver.transposed else data)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "bert"])
@pytest.mark.parametrize("parts", ["matrices", "all"])
def test_share_of_equal_blocks_is_exact(family, parts, folders, tmp_path):
    model = twins(family, folders[family])
    model.save_pretrained(tmp_path / "in")
    pico.tokenizer().save_pretrained(tmp_path / "in")
    share(tmp_path / "in", tmp_path / "out", groups=2, parts=parts)
    small = load_model(tmp_path / "out")
    assert torch.allclose(pico.logits(small), pico.logits(model), rtol=1e-3, atol=1e-3)
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())
    share(tmp_path / "in", tmp_path / "apart", groups=2, parts=parts, align=False, arrangement="sequence")
    worse = (pico.logits(load_model(tmp_path / "apart")) - pico.logits(model)).abs().max()
    assert worse > 10 * (pico.logits(small) - pico.logits(model)).abs().max()


@pytest.mark.parametrize("family", ["olmo3", pytest.param("granite_swa", marks=pytest.mark.slow)])
def test_share_puts_logits_and_norms_of_heads_in_order(family, tmp_path):
    """Blocks keep logits and norms of their own, in the order of the shared heads."""
    kinds = ["full_attention"] * 2 + ["sliding_attention"] * 2
    model = twins(family, pico.folder(family, layer_types=kinds))
    model.save_pretrained(tmp_path / "in")
    pico.tokenizer().save_pretrained(tmp_path / "in")
    share(tmp_path / "in", tmp_path / "out", groups=2)
    small = load_model(tmp_path / "out")
    assert torch.allclose(pico.logits(small), pico.logits(model), rtol=1e-3, atol=1e-3)


def error(folder, original):
    return divergence(original, folder, IDS)


@pytest.mark.slow
def test_share_least_squares_beats_mean_and_residuals_help(folders, tmp_path):
    found = {}
    for name, settings in {
        "first": {"init": "first"},
        "mean": {"init": "mean"},
        "fisher": {"init": "fisher"},
        "solved": {},
        "residual": {"residual_rank": 3},
    }.items():
        share(folders["llama"], tmp_path / name, groups=[[0, 1], [2, 3]], **settings)
        found[name] = error(tmp_path / name, folders["llama"])
    assert found["residual"] < found["solved"] < found["mean"]
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize(
    "arrangement", ["cycle", *(pytest.param(one, marks=pytest.mark.slow) for one in ("best", "sequence", "nearest"))]
)
def test_share_arrangements_place_blocks(arrangement, folders, tmp_path):
    details = {}
    share(folders["llama"], tmp_path / "out", groups=2, arrangement=arrangement, details=details)
    groups = details["sharing"]["groups"]
    wanted = {"sequence": [[0, 1], [2, 3]], "cycle": [[0, 2], [1, 3]]}
    assert groups == wanted.get(arrangement, groups)
    assert sorted(i for g in groups for i in g) == [0, 1, 2, 3]
    tried = details["sharing"]["tried"]
    if arrangement == "best":
        assert {row["arrangement"] for row in tried} == {"sequence", "cycle", "nearest"}
        assert min(tried, key=lambda row: row["divergence"])["groups"] == groups
    spec = open_checkpoint(tmp_path / "out").spec
    aliases = {t.name: t.alias_of for t in spec.tensors.values() if t.alias_of and "layers" in t.name}
    assert len(aliases) == 2 * 7
    assert all(a.split(".", 3)[3] == b.split(".", 3)[3] for a, b in aliases.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "fraction"),
    [
        ([("share", {"groups": 2, "residual_rank": 0}), ("distill", {"steps": 3}), ("cast", {"weights": "int8"})], 0.5),
        ([("share", {"groups": 2, "residual_rank": 2}), ("distill", {"steps": 3})], 0.8),
        (
            [
                ("share", {"groups": 2, "residual_rank": 0}),
                ("prune_unstructured", {"sparsity": 0.5, "effort": "fast"}),
                ("cast", {"weights": "int4", "group_size": 32, "effort": "fast"}),
            ],
            0.5,
        ),
    ],
)
@pytest.mark.parametrize("family", pico.families(["llama", "gpt2"], tier=("llama",)))
def test_share_survives_later_passes(family, steps, fraction, folders, texts, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    more = {"distill": {"batch_size": 4, "validation_samples": 4, "allow_noop": True}}
    passes = [{name: {**settings, **more.get(name, {})}} for name, settings in steps]
    data = {"files": [str(texts[0])], "length": 32}
    recipe.write_text(
        json.dumps(
            {
                "model": str(folders[family]),
                "output": str(tmp_path / "out"),
                "store": "compact",
                "document_separator": "<|doc|>",
                "data": {"calibration": {**data, "samples": 16}, "training": data},
                "passes": passes,
            }
        )
    )
    result = compress.run(recipe)
    for stage in result.report["stages"]:
        for row in stage["passes"]:
            assert not row["exact"] or row["planned"]["bytes"] == row["actual"]["bytes"], row["name"]
    stored = open_checkpoint(tmp_path / "out")
    shared = [t for t in stored.spec.tensors.values() if t.alias_of and ".1." in t.name]
    assert shared
    model = load_model(tmp_path / "out")
    assert sum(p.numel() for p in model.parameters()) == stored.spec.parameters
    unpack(tmp_path / "out", tmp_path / "dense")
    assert torch.allclose(pico.logits(model), pico.logits(load_model(tmp_path / "dense")), rtol=1e-4, atol=1e-3)
    sizes = [sum(f.stat().st_size for f in p.glob("*.safetensors")) for p in (tmp_path / "out", tmp_path / "dense")]
    assert sizes[0] < (fraction + 0.3) * sizes[1]
    if ("prune_unstructured", {"sparsity": 0.5}) in steps:
        masks = [t for t in stored.spec.stored() if t.kept is not None]
        assert masks
        assert all(t.kept == round(t.count / 2) for t in masks)


@pytest.mark.parametrize(
    "class_name",
    pico.families(["BertForMaskedLM", "BertForSequenceClassification", "BertModel"], tier=("BertForMaskedLM",)),
)
def test_share_turns_bert_into_albert(class_name, tmp_path, stock_outputs):
    pico.save(tmp_path / "in", "bert", class_name=class_name)
    config = json.loads((tmp_path / "in/tokenizer_config.json").read_text())
    compress.apply("share", tmp_path / "in", tmp_path / "out", data=IDS, groups=2, parts="all")
    found = json.loads((tmp_path / "out/config.json").read_text())
    assert found["model_type"] == "albert"
    assert found["num_hidden_groups"] == 2
    assert found["architectures"] == [class_name.replace("Bert", "Albert")]
    model = load_model(tmp_path / "out")
    pico.save_expected(model, tmp_path / "expected.pt")
    cases = {"albert": (found["architectures"][0], tmp_path / "out", tmp_path / "expected.pt")}
    assert stock_outputs(cases)["albert"]["difference"] < 1e-6
    text = "the ids are the same"
    ids = [transformers.AutoTokenizer.from_pretrained(tmp_path / f)(text)["input_ids"] for f in ("in", "out")]
    assert ids[0] == ids[1]
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == {
        "tokenizer_class": "BertTokenizer",
        **config,
    }


def test_share_albert_matches_shared_bert(tmp_path):
    """The BERT with the group's tensors in each of its blocks, by stock code."""
    folder = pico.save(tmp_path / "in", "bert")
    compress.apply("share", folder, tmp_path / "out", data=IDS, groups=2, parts="all")
    albert, bert = load_model(tmp_path / "out"), load_model(folder)
    groups = albert.albert.encoder.albert_layer_groups
    with torch.no_grad():
        for number, block in enumerate(bert.bert.encoder.layer):
            layer = groups[number // 2].albert_layers[0]
            for mine, theirs in (
                (block.attention.self.query, layer.attention.query),
                (block.attention.self.key, layer.attention.key),
                (block.attention.self.value, layer.attention.value),
                (block.attention.output.dense, layer.attention.dense),
                (block.attention.output.LayerNorm, layer.attention.LayerNorm),
                (block.intermediate.dense, layer.ffn),
                (block.output.dense, layer.ffn_output),
                (block.output.LayerNorm, layer.full_layer_layer_norm),
            ):
                mine.load_state_dict(theirs.state_dict())
        mask = torch.ones_like(IDS)
        mask[:, 20:] = 0
        x, y = (m(input_ids=IDS, attention_mask=mask).logits[:, :20] for m in (albert, bert))
    assert torch.allclose(x, y, rtol=0, atol=1e-6 * float(y.abs().max()))


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {"groups": 3}, "4 blocks cannot be 3 groups"),
        ("llama", {"groups": 4}, "4 blocks cannot be 4 groups"),
        ("llama", {"groups": [[0, 9]]}, "no block 9"),
        ("llama", {"groups": [[0, 1], [1, 2]]}, "at most once"),
        ("llama", {"groups": [[0]]}, "two blocks or more"),
        ("gemma2", {"groups": 2, "arrangement": "sequence"}, "blocks 0 and 1 are unlike: layer_types"),
        ("llama", {"groups": 2, "residual_rank": 16}, "as large as what sharing .* set residual_rank to 5 or less"),
        ("llama", {"groups": 2, "residual_rank": None}, "residuals of rank 8 are as large"),
        ("llama", {"groups": 2, "skip": ["model.layers.0.*"]}, "in some blocks and not in others"),
        ("llama", {"groups": 2, "skip": ["*layers*"]}, "nothing is left to share"),
    ],
)
def test_share_refuses_unfit_models(family, settings, message, folders, tmp_path):
    with pytest.raises(CompressError, match=message) as problem:
        share(folders[family], tmp_path / "out", **settings)
    assert "\n" not in str(problem.value)
    assert not (tmp_path / "out").exists()


def test_share_picks_arrangement_of_like_blocks(folders, tmp_path):
    details = {}
    share(folders["gemma2"], tmp_path / "out", groups=2, details=details)
    assert details["sharing"]["groups"] == [[0, 2], [1, 3]]


@pytest.mark.slow
def test_share_nearest_blocks_are_like_blocks(tmp_path):
    """Blocks 0 and 2 are the same and so are 1 and 3, but their attention differs."""
    model = pico.model("gemma2", num_hidden_layers=8, layer_types=4 * ["sliding_attention"] + 4 * ["full_attention"])
    with torch.no_grad():
        for number in range(4):
            model.model.layers[number + 4].load_state_dict(model.model.layers[number].state_dict())
    model.save_pretrained(tmp_path / "in")
    details = {}
    share(tmp_path / "in", tmp_path / "out", groups=4, arrangement="nearest", details=details)
    types = json.loads((tmp_path / "in/config.json").read_text())["layer_types"]
    assert all(len({types[i] for i in group}) == 1 for group in details["sharing"]["groups"])


@pytest.mark.slow
def test_share_follows_other_passes(folders, tmp_path):
    compress.apply("cast", folders["llama"], tmp_path / "int8", weights="int8", method="rtn")
    compress.apply("prune_unstructured", folders["llama"], tmp_path / "masks", method="magnitude", sparsity=0.5)
    share(folders["llama"], tmp_path / "shared", groups=2)
    for name, message in {"int8": "is quantised", "masks": "has weights removed", "shared": "shares tensors"}.items():
        with pytest.raises(PassError, match=message):
            share(tmp_path / name, tmp_path / "out", groups=2)
    with pytest.raises(PassError, match="prune_structured cannot change this checkpoint"):
        compress.apply("prune_structured", tmp_path / "shared", tmp_path / "out", layers=1)
    with pytest.raises(
        PassError, match="shares tensors with other blocks, so no block can be removed; remove blocks before sharing"
    ):
        compress.apply(
            "distill", tmp_path / "shared", tmp_path / "out", store="compact", student={"layers": 2}, steps=1, data=IDS
        )
    with pytest.raises(PassError, match="use `store: compact`"):
        compress.apply("share", folders["llama"], tmp_path / "out", groups=2, residual_rank=0, data=IDS)


@pytest.mark.slow
def test_share_refuses_experts_and_encoder_decoders(tmp_path):
    pico.save(tmp_path / "moe", "mixtral")
    with pytest.raises(PassError, match="set `parts: attention`"):
        share(tmp_path / "moe", tmp_path / "out", groups=2)
    share(tmp_path / "moe", tmp_path / "out", groups=2, parts="attention")
    load_model(tmp_path / "out")
    pico.save(tmp_path / "t5", "t5")
    with pytest.raises(PassError, match="cannot be changed block by block"):
        share(tmp_path / "t5", tmp_path / "no", groups=2)


def test_share_takes_linear_layers_alone(tmp_path):
    """I-BERT has a buffer of two axes beside each weight; a record may name no list of blocks."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.IBertModel(transformers.IBertConfig(**sizes, vocab_size=40)).save_pretrained(tmp_path / "in")
    spec = open_checkpoint(tmp_path / "in").spec
    parts = shared_parts(spec, ShareSettings(groups=[[0, 1]], residual_rank=0))
    assert len(parts) == 6
    assert all(part.endswith(".weight") for part in parts)
    other = replace(spec)
    model_map(other).__dict__["record"] = replace(model_map(spec).record, lists=())
    with pytest.raises(PassError, match="no list of blocks is known of this model; leave `groups` out"):
        shared_parts(other, ShareSettings(groups=[[0, 1]]))


def test_share_ties_embeddings_towards_both(folders, tmp_path, stock):
    folder = pico.save(tmp_path / "in", "llama", tie_word_embeddings=False)
    compress.apply("share", folder, tmp_path / "out", embeddings="tie", data=IDS)
    before, after = (open_checkpoint(f).spec for f in (folder, tmp_path / "out"))
    assert before.parameters - after.parameters == before.tensors["lm_head.weight"].count
    model = load_model(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "model_type" in stock(f"import json; print(json.load(open({str(tmp_path / 'out/config.json')!r})))")
    found = {}
    original = load_model(folder)
    for name in ("input", "output"):
        tied_ = load_model(tmp_path / "out")
        with torch.no_grad():
            source = original.lm_head if name == "output" else original.model.embed_tokens
            tied_.lm_head.weight.copy_(source.weight)
        found[name] = divergence(original, tied_, IDS)
    assert error(tmp_path / "out", folder) < min(found.values())
    with pytest.raises(PassError, match="tied already"):
        compress.apply("share", tmp_path / "out", tmp_path / "again", embeddings="tie", data=IDS)


@pytest.mark.slow
def test_share_is_followed_by_codebooks(folders, tmp_path):
    share(folders["llama"], tmp_path / "out", groups=2, codebook_bits=4)
    spec = open_checkpoint(tmp_path / "out").spec
    coded = [t for t in spec.stored() if t.quant_format is not None]
    assert len(coded) == 2 * 7
    assert all(len(open_checkpoint(tmp_path / "out").tensor(t.name).data.unique()) <= 16 for t in coded)
    assert error(tmp_path / "out", folders["llama"]) > 0
    share(folders["gpt2"], tmp_path / "alone", codebook_bits=6)
    assert error(tmp_path / "alone", folders["gpt2"]) < 0.1
    with pytest.raises(CompressError, match="give `groups`, `embeddings` or `codebook_bits`"):
        share(folders["gpt2"], tmp_path / "none")
