"""What a record says of a family is what stock transformers does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compress import architectures
from compress.architectures.inference import infer
from compress.architectures.model_map import model_map
from compress.blockwise.streamed import StreamedModel
from compress.checkpoint.layout import lay_out
from compress.checkpoint.open import open_checkpoint
from compress.errors import PassError
from compress.models.blocks import find_blocks
from compress.models.loading import check_keys, load_checkpoint, load_model
from compress.planning import size_of
from tests import pico
from tests.toolbox import apply, bypass, edit_config, plan, write

CAUSAL = [family for family in pico.FAMILIES if architectures.of({"model_type": family}).causal]


def record_of(checkpoint):
    return architectures.of(checkpoint.spec.structure.config)


def size(checkpoint):
    return size_of(checkpoint.spec, lay_out(checkpoint.spec, 1 << 40))


def test_records_all_have_a_pico_model():
    assert {record.model_type for record in architectures.RECORDS} <= {*pico.FAMILIES, *pico.FURTHER}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CAUSAL)
def test_cache_bytes_match_real_cache(family, dtype, tmp_path):
    """Up to the length of a sliding window."""
    folder = pico.save(tmp_path / "in", family, dtype=dtype)
    model = load_model(folder)
    with torch.no_grad():
        cache = model(**pico.inputs(model, 5), use_cache=True).past_key_values
    held = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    assert size(open_checkpoint(folder)).kv_bytes_per_token * 5 == held


@pytest.mark.parametrize("family", [family for family in pico.FAMILIES if family not in CAUSAL])
def test_cache_bytes_are_zero_for_encoders(family, tmp_path):
    assert size(open_checkpoint(pico.save(tmp_path / "in", family))).kv_bytes_per_token is None


@pytest.mark.parametrize("family", pico.families())
def test_prunable_are_linear_layers_of_blocks_and_experts(family, tmp_path):
    """Not routers, embeddings, convolutions, heads or what is tied to them."""
    checkpoint = open_checkpoint(pico.save(tmp_path / "in", family))
    pruned = plan(checkpoint, "prune_unstructured", method="magnitude", sparsity=0.5)
    chosen = sum(t.count for t in pruned.stored() if t.kept is not None)
    model, record = load_model(checkpoint.folder), record_of(checkpoint)
    lists = [find_blocks(model, record), *(model.get_submodule(stack) for stack in record.stacks)]
    linear = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    modules = [(n, m) for blocks in lists for n, m in blocks.named_modules() if isinstance(m, linear)]
    expected = sum(m.weight.numel() for n, m in modules if not n.endswith(record.routers or ("-",)))
    expected += sum(p.numel() for blocks in lists for p in blocks.parameters() if p.ndim == 3)  # fused experts
    assert chosen == expected
    assert not [t.name for t in pruned.stored() if t.kept is not None and "gate.weight" in t.name]


def test_routers_are_matched_by_name(tmp_path):
    checkpoint = open_checkpoint(pico.save(tmp_path / "in", "qwen3_moe"))
    pruned = plan(checkpoint, "prune_unstructured", method="magnitude", sparsity=0.5, only=["*.mlp.gate"])
    assert [t.name for t in pruned.stored() if t.kept is not None] == [
        f"model.layers.{i}.mlp.gate.weight" for i in (0, 2, 3)
    ]


@pytest.mark.parametrize(
    ("family", "idle"),
    [
        ("mixtral", 4 * (4 - 2) * 3 * 64 * 32),  # blocks × experts unused by a token × matrices × shape
        ("qwen3_moe", 3 * (4 - 1) * 3 * 32 * 32),  # block 1 has no experts
        ("llama", 0),
    ],
)
def test_active_parameters_leave_out_unused_experts(family, idle, tmp_path):
    checkpoint = open_checkpoint(pico.save(tmp_path / "in", family))
    found = size(checkpoint)
    assert found.parameters == sum(p.numel() for p in load_model(checkpoint.folder).parameters())
    assert found.active_parameters == found.parameters - idle


def test_active_parameters_read_older_name_of_experts(tmp_path):
    folder = pico.save(tmp_path / "in", "qwen3_moe")
    now = size(open_checkpoint(folder)).active_parameters
    edit_config(folder, num_local_experts=..., num_experts=4)
    assert size(open_checkpoint(folder)).active_parameters == now


@pytest.mark.parametrize(
    "family", pico.families([f for f in pico.FAMILIES if f != "vit"], tier=(*pico.TIER, "roberta", "opt"))
)
def test_positions_match_stock_model(family, tmp_path):
    """With one token more it fails; where the record says no limit, it goes on beyond what the config was trained for."""
    spec = open_checkpoint(pico.save(tmp_path / "in", family)).spec
    model, positions = load_model(tmp_path / "in"), model_map(spec).positions
    ids = torch.full((1, 100), 7)
    with torch.no_grad():
        if family in ("gpt2", "opt", "albert", "bert", "roberta", "electra", "distilbert"):
            assert positions == {"roberta": 64 - 1 - pico.PADDING["roberta"]}.get(family, 64)
            model(ids[:, :positions])
            with pytest.raises((IndexError, RuntimeError)):
                model(ids[:, : positions + 1])
        else:
            assert positions is None
            second = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
            assert model(ids, **second)[0].isfinite().all()


def test_positions_of_roberta_begin_after_padding_token(tmp_path):
    folder = pico.save(tmp_path / "in", "roberta", pad_token_id=5)
    assert model_map(open_checkpoint(folder).spec).positions == 58
    model = load_model(folder)
    with torch.no_grad():
        model(torch.full((1, 58), 7))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, 59), 7))
    edit_config(folder, pad_token_id=...)  # transformers takes 1
    assert model_map(open_checkpoint(folder).spec).positions == 62


TIED = [
    ("gemma2", "lm_head.weight", "model.embed_tokens.weight"),
    ("gemma3_text", "lm_head.weight", "model.embed_tokens.weight"),
    ("minicpm3", "lm_head.weight", "model.embed_tokens.weight"),
    ("gpt2", "lm_head.weight", "transformer.wte.weight"),
    ("bloom", "lm_head.weight", "transformer.word_embeddings.weight"),
    ("opt", "lm_head.weight", "model.decoder.embed_tokens.weight"),
    ("albert", "predictions.decoder.weight", "albert.embeddings.word_embeddings.weight"),
    ("bert", "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    ("roberta", "lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
    ("electra", "generator_lm_head.weight", "electra.embeddings.word_embeddings.weight"),
    ("distilbert", "vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"),
]


@pytest.mark.parametrize("said", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize(("family", "target", "source"), TIED)
def test_ties_match_stock_class_by_default(family, target, source, said, tmp_path):
    """The aliases are the parameters that the stock class shares and the file leaves out; naming the head means both."""
    folder = pico.save(tmp_path / "in", family)
    if not said:
        edit_config(folder, tie_word_embeddings=...)
    checkpoint = open_checkpoint(folder)
    model = load_model(folder)
    shared = {id(p): name for name, p in model.named_parameters()}
    twice = {n: shared[id(p)] for n, p in model.named_parameters(remove_duplicate=False) if shared[id(p)] != n}
    aliases = {t.name: t.alias_of for t in checkpoint.spec.tensors.values() if t.alias_of}
    assert aliases[target] == source
    assert {frozenset(pair) for pair in aliases.items()} == {frozenset(pair) for pair in twice.items()}
    pruned = plan(
        checkpoint, "prune_unstructured", method="magnitude", sparsity=0.5, only=[target.removesuffix(".weight")]
    )
    assert [t.name for t in pruned.tensors.values() if t.kept is not None] == [source]


@pytest.mark.parametrize(
    ("family", "target", "source"),
    [
        pytest.param(*case, marks=[] if case[0] in pico.TIER else [pytest.mark.slow])
        for case in (*TIED, ("t5", "lm_head.weight", "shared.weight"))
    ],
)
def test_ties_read_head_when_embedding_is_left_out(family, target, source, tmp_path):
    folder = pico.save(tmp_path / "in", family)
    state = load_file(folder / "model.safetensors")
    state[target] = state.pop(source)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(folder)
    check_keys(checkpoint)
    assert checkpoint.spec.tensors[source].alias_of == target
    assert torch.allclose(pico.logits(load_checkpoint(checkpoint)), pico.logits(pico.model(family)), atol=1e-6)


@pytest.mark.parametrize("family", sorted(set(pico.FAMILIES) - {"t5", *(row[0] for row in TIED)}))
def test_ties_are_absent_in_families_without_them(family, tmp_path):
    folder = pico.save(tmp_path / "in", family)
    edit_config(folder, tie_word_embeddings=...)
    checkpoint = open_checkpoint(folder)
    assert [t.name for t in checkpoint.spec.tensors.values() if t.alias_of] == []
    check_keys(checkpoint)


@pytest.mark.parametrize("family", pico.families(row[0] for row in TIED))
def test_untied_heads_are_tensors_of_their_own(family, tmp_path):
    checkpoint = open_checkpoint(pico.save(tmp_path / "in", family, tie_word_embeddings=False))
    assert [t.name for t in checkpoint.spec.tensors.values() if t.alias_of] == []
    check_keys(checkpoint)


@pytest.mark.parametrize("said", [True, False])
def test_ties_of_t5_depend_on_head_in_file(said, tmp_path):
    """Its stock config ties always, and keeps a head that the file holds (as version 1.1 has it) all the same."""
    folder = pico.save(tmp_path / "in", "t5")
    if not said:
        state = load_file(folder / "model.safetensors")
        state["lm_head.weight"] = torch.randn(state["shared.weight"].shape)
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        edit_config(folder, scale_decoder_outputs=..., tie_word_embeddings=False)
    checkpoint = open_checkpoint(folder)
    check_keys(checkpoint)
    aliases = {t.name: t.alias_of for t in checkpoint.spec.tensors.values() if t.alias_of}
    assert aliases == ({"lm_head.weight": "shared.weight"} if said else {})
    assert load_model(folder).config.scale_decoder_outputs is said
    smaller = write(
        apply(checkpoint, "prune_structured", mlp=16, importance="magnitude", compensation="none"), tmp_path / "out"
    )
    after = load_model(smaller.folder)
    assert after.config.scale_decoder_outputs is said
    assert torch.equal(after.lm_head.weight, checkpoint.tensor("lm_head.weight").data)


def test_discriminator_has_no_vocabulary_head(tmp_path):
    transformers.ElectraForPreTraining(pico.config("electra")).save_pretrained(tmp_path / "in")
    checkpoint = open_checkpoint(tmp_path / "in")
    assert [t.name for t in checkpoint.spec.tensors.values() if t.alias_of] == []
    check_keys(checkpoint)


@pytest.mark.parametrize("family", pico.families(tier=("llama", "gpt2", "bert", "t5")))
def test_base_class_files_load(family, tmp_path):
    model = transformers.AutoModel.from_config(pico.config(family)).eval()
    model.save_pretrained(tmp_path / "in")
    checkpoint = open_checkpoint(tmp_path / "in")
    check_keys(checkpoint)
    if family not in pico.ONE_LIST:
        assert torch.allclose(pico.logits(load_checkpoint(checkpoint)), pico.logits(model), atol=1e-5)
        return
    bypass(model, (0, 2))
    smaller = load_checkpoint(apply(checkpoint, "prune_structured", layers=[0, 2], compensation="none"))
    assert torch.allclose(pico.logits(smaller), pico.logits(model), atol=1e-5)


@pytest.mark.parametrize("family", pico.families(tier=("gpt2", "bloom", "bert", "vit")))
def test_prefix_may_be_absent_in_files_with_a_head(family, tmp_path):
    """As the first GPT-2 and BLOOM checkpoints do."""
    folder = pico.save(tmp_path / "in", family)
    aliases = [t.name for t in open_checkpoint(folder).spec.tensors.values() if t.alias_of]
    prefix = f"{pico.model(family).base_model_prefix}."
    state = {name.removeprefix(prefix): value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(folder)
    check_keys(checkpoint)
    assert [t.name for t in checkpoint.spec.tensors.values() if t.alias_of] == aliases
    assert torch.allclose(pico.logits(load_checkpoint(checkpoint)), pico.logits(pico.model(family)), atol=1e-6)
    removed = {"layers": [0, 2]} if family in pico.ONE_LIST else {"mlp": 32, "importance": "magnitude"}
    load_checkpoint(apply(checkpoint, "prune_structured", compensation="none", **removed))


def same_as_bypassed(folder, drop):
    """Dropping blocks from a checkpoint with that config equals bypassing them; returns the new config."""
    smaller = load_checkpoint(apply(open_checkpoint(folder), "prune_structured", layers=drop, compensation="none"))
    model = load_model(folder)
    bypass(model, drop)
    assert torch.allclose(pico.logits(smaller), pico.logits(model), rtol=0, atol=1e-5)
    return plan(open_checkpoint(folder), "prune_structured", layers=drop, compensation="none").structure.config


@pytest.mark.parametrize(
    ("family", "older"),
    [
        ("gemma2", {}),
        ("gemma3_text", {"sliding_window_pattern": 2}),
        ("qwen2", {}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": False, "sliding_window": 6, "max_window_layers": 1}),
    ],
)
def test_layer_types_are_derived_when_config_leaves_them_out(family, older, tmp_path):
    """Stock transformers derives them from each block's number, which changes when blocks go."""
    folder = pico.save(tmp_path / "in", family)
    edit_config(folder, layer_types=..., _sliding_window_pattern=..., **older)
    derived = load_model(folder).config.layer_types
    config = same_as_bypassed(folder, [0, 3])
    assert config["layer_types"] == [derived[1], derived[2]]


@pytest.mark.parametrize(
    ("step", "listed", "drop", "left"),
    [
        (1, [1], [0], [0]),
        (1, [1], [1], []),
        (1, None, [1], []),
        (2, [1], [0], [0, 1]),  # experts in block 3 alone: 1, 2, 3 become 0, 1, 2
        (2, [], [1, 2], [0]),
        (3, [], [2], [0, 1, 2]),
    ],
)
def test_expert_blocks_are_renumbered_when_blocks_go(step, listed, drop, left, tmp_path):
    folder = pico.save(tmp_path / "in", "qwen3_moe", decoder_sparse_step=step, mlp_only_layers=listed)
    config = same_as_bypassed(folder, drop)
    assert config["mlp_only_layers"] == left
    assert config["decoder_sparse_step"] == 1


def test_config_fields_of_other_spellings_are_read(tmp_path):
    """As in bigscience/bloom; the spelling that counts is gone once its value would be stale."""
    folder = pico.save(tmp_path / "in", "bloom")
    edit_config(
        folder, n_layer=..., hidden_size=..., n_head=..., num_hidden_layers=4, n_embed=32, num_attention_heads=4
    )
    assert size(open_checkpoint(folder)).kv_bytes_per_token == 2 * 4 * 32 * 4
    config = same_as_bypassed(folder, [1])
    assert config["n_layer"] == 3
    assert "num_hidden_layers" not in config


def test_blocks_that_compute_by_number_cannot_go(tmp_path):
    checkpoint = open_checkpoint(pico.save(tmp_path / "in", "gpt2", scale_attn_by_inverse_layer_idx=True))
    with pytest.raises(
        PassError, match="`scale_attn_by_inverse_layer_idx` makes the computation of a block depend on its number"
    ) as e:
        plan(checkpoint, "prune_structured", layers=[1], compensation="none")
    assert e.value.key == "layers"


def test_find_reads_records_of_entry_points(monkeypatch):
    """Entry points add records; one that is none is refused by name."""
    from importlib import metadata

    from compress.architectures import _by_type

    def points(value):
        return lambda group: [metadata.EntryPoint("mine", value, group)]

    _by_type.cache_clear()
    try:
        monkeypatch.setattr(architectures, "entry_points", points("tests.architectures.test_records:FOREIGN"))
        assert architectures.of({"model_type": "foreign"}) is FOREIGN
        assert architectures.find({"model_type": "llama"}) is not None
        _by_type.cache_clear()
        monkeypatch.setattr(architectures, "entry_points", points("tests.pico:VOCABULARY"))
        with pytest.raises(PassError, match=r"names tests\.pico:VOCABULARY, which is not an Architecture"):
            architectures.of({"model_type": "foreign"})
        _by_type.cache_clear()
        monkeypatch.setattr(architectures, "entry_points", points("no_such_package:RECORD"))
        with pytest.raises(PassError, match="`no_such_package:RECORD` cannot be loaded"):
            architectures.of({"model_type": "foreign"})
    finally:
        _by_type.cache_clear()


def test_a_record_with_a_place_that_is_not_there_is_refused(monkeypatch, tmp_path):
    """`blocks` of files is compared with the headers; where the list is in memory shows when the model is built."""
    transformers.MistralForCausalLM(pico.config("mistral")).save_pretrained(tmp_path / "in")
    right = architectures.of({"model_type": "mistral"})
    spec = open_checkpoint(tmp_path / "in").spec
    inferred = infer(spec)
    elsewhere = replace(inferred, source="written", lists=(replace(inferred.lists[0], module="model.layerz"),))
    nowhere = replace(inferred, source="written", lists=())
    model = load_model(tmp_path / "in")
    assert len(find_blocks(model, right)) == len(find_blocks(model, inferred))
    place = "the record of mistral names a list of blocks that MistralForCausalLM does not have: model.layerz; correct"
    for record, message in (
        (replace(right, module_blocks="layerz"), place),
        (elsewhere, place),
        (nowhere, "no list of blocks is known of MistralForCausalLM; use a method that needs none"),
    ):
        with pytest.raises(PassError, match=message):
            find_blocks(model, record)
        checkpoint = open_checkpoint(tmp_path / "in")
        model_map(checkpoint.spec).__dict__["record"] = record
        with pytest.raises(PassError, match=message):
            StreamedModel(checkpoint, dtype=torch.float32, device="cpu")


FOREIGN = architectures.Architecture("foreign", prefix="model", blocks="layers", embeddings=("embed_tokens",))
