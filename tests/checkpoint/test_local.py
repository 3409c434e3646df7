"""Heads with windows of their own: equal to hand-made masks, at once and through the cache, in every decoder."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers

import compress
from compress.architectures.cache import cache_values
from compress.architectures.model_map import model_map
from compress.checkpoint.edits.local import attentions, localised
from compress.checkpoint.edits.local_cache import HeadWindows
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.values import Derived
from compress.checkpoint.write import write_checkpoint
from compress.errors import CheckpointError, CompressError, PassError
from compress.models.loading import check_keys, load_checkpoint, load_model
from compress.models.sameness import same_logits
from tests import pico

FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "mixtral",
    "qwen3_moe",
    "gpt2",
    "gpt_neox",
    "opt",
)
CHANGES = {
    "gpt2": {"n_positions": 512},
    "qwen2": {"use_sliding_window": False, "max_position_embeddings": 512},
    "mistral": {"sliding_window": None, "max_position_embeddings": 512},
}
PATTERNS = {"window": {}, "strided": {"stride": 5}, "fixed": {"keep": 3}, "chunks": {}}
PROMPT, CHUNK, LENGTH = 150, 200, 256


def of_pattern(heads, pattern="window"):
    """Values of an edit: the first of several heads is full."""
    full = [0] if heads > 1 else []
    values = {"window": 16, "sinks": 4, "heads": heads, "full": full, "pattern": pattern, "positions": 400}
    return values | PATTERNS[pattern]


def local(family="llama", pattern="window", blocks=slice(1, None)):
    """A pico model with windows in all blocks but the first."""
    base = open_checkpoint(pico.folder(family, **CHANGES.get(family, {"max_position_embeddings": 512})))
    values = of_pattern(model_map(base.spec).kv_heads, pattern)
    return Derived(base, localised(base.spec, dict.fromkeys(list(attentions(base.spec))[blocks], values)), base.tensor)


def mask(values, length):
    """What each query head sees, bool [KV heads, Q, N], by the definitions of docs/format.md."""
    q, k = torch.arange(length)[:, None], torch.arange(length)[None]
    window, pattern = values["window"], values["pattern"]
    own = q // window == k // window if pattern in ("fixed", "chunks") else q - k < window
    far = {
        "strided": lambda: k % values["stride"] == values["stride"] - 1,
        "fixed": lambda: k % window >= window - values["keep"],
    }.get(pattern, lambda: k < 0)()
    seen = own | far | (k < values["sinks"])
    return torch.stack([(seen | (head in values["full"])) & (k <= q) for head in range(values["heads"])])


def masked(checkpoint, length):
    """The stock model, eager, with hand-made masks."""
    folder = checkpoint.folder
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    groups = model.config.num_attention_heads // model_map(checkpoint.spec).kv_heads
    for edit in checkpoint.spec.structure.edits:
        seen = mask(edit.values, length).repeat_interleave(groups, 0)[None]
        terms = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        names = (edit.module, f"{model.base_model_prefix}.{edit.module}")
        module = next(dict(model.named_modules())[name] for name in names if name in dict(model.named_modules()))
        module.register_forward_pre_hook(
            lambda module, args, kwargs, terms=terms: (args, {**kwargs, "attention_mask": terms}), with_kwargs=True
        )
    return model


def stepped(model, ids, cuts):
    """Logits of pieces of a text, one after another through the cache, and the cache."""
    cache, logits = transformers.DynamicCache(config=model.config), []
    for piece in torch.tensor_split(ids, cuts, 1):
        logits.append(model(piece, cache=cache, use_cache=True).logits)
    return torch.cat(logits, 1), cache


def difference(logits, expected):
    """Largest difference, relative to the largest logit."""
    return float((logits - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A Llama with the edit, written and loaded."""
    folder = tmp_path_factory.mktemp("local") / "small"
    write_checkpoint(local(), folder, store="compact")
    return folder, compress.load(folder)


@pytest.mark.parametrize(
    ("family", "pattern"),
    [
        *(pytest.param("llama", pattern, marks=[pytest.mark.slow] * (pattern != "window")) for pattern in PATTERNS),
        *(pytest.param(family, "window", marks=pytest.mark.slow) for family in FAMILIES[1:]),
    ],
)
@torch.inference_mode()
def test_heads_match_hand_made_masks_at_once_and_through_the_cache(family, pattern, tmp_path):
    checkpoint = local(family, pattern)
    assert checkpoint.spec.structure.edits
    write_checkpoint(checkpoint, tmp_path / "small", store="compact")
    stored = open_checkpoint(tmp_path / "small")
    assert stored.spec.structure == checkpoint.spec.structure
    check_keys(stored)
    same_logits(checkpoint, stored)

    model = load_model(tmp_path / "small")
    ids = torch.randint(1, 250, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    expected = masked(checkpoint, LENGTH)(ids).logits
    assert difference(model(ids).logits, expected) < 1e-5
    logits, cache = stepped(model, ids, [PROMPT, CHUNK, *range(CHUNK + 1, LENGTH)])
    assert difference(logits, expected) < 1.5e-5
    assert not torch.allclose(load_model(checkpoint.folder)(ids).logits, expected, atol=0.1)

    held = [
        t
        for layer in cache.layers
        for t in vars(layer).values()
        if isinstance(t, torch.Tensor) and t.is_floating_point()
    ]
    assert sum(tensor.numel() for tensor in held) == 2 * cache_values(stored.spec, LENGTH)
    assert all(t.untyped_storage().nbytes() <= 4 * t[:, :, :1].numel() * LENGTH for t in held)


@torch.inference_mode()
def test_cache_holds_no_tensor_of_the_whole_prompt(loaded):
    _, cache = stepped(loaded[1], torch.randint(1, 250, (1, LENGTH)), [])
    layer = cache.layers[1]
    for tensor in (layer.local_keys, layer.local_values):
        assert tensor.shape[2] == 20
        assert tensor.untyped_storage().nbytes() == 4 * tensor.numel()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("window", [1, 5, *(pytest.param(window, marks=pytest.mark.slow) for window in (2, 8))])
@pytest.mark.parametrize("sinks", [0, 1, 3, 7, 20])
def test_kept_places_are_those_that_the_last_token_sees(pattern, window, sinks):
    for more in (1, 2, 3, 5):
        numbers = {"stride": more, "keep": min(more, window)}
        seen = HeadWindows(
            {"window": window, "sinks": sinks, "pattern": pattern, "full": [], "positions": 9, **numbers}
        )
        for count in range(1, 50):
            places = torch.arange(count)
            kept = seen.kept(count)
            assert torch.equal(kept, places[seen.sees(count - 1, places)])
            assert seen.count(count) == len(kept)
            first, last = (len(kept) - column for column in seen.dropped(count))
            assert torch.equal(torch.cat([kept[:first], kept[last:], torch.tensor([count])]), seen.kept(count + 1))


GREEDY = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize(
    "more",
    [{"prefill_chunk_size": 7}, *(pytest.param(each, marks=pytest.mark.slow) for each in ({}, {"num_beams": 3}))],
)
def test_generation_through_the_cache_equals_generation_without(more, loaded):
    ids = torch.randint(1, 250, (2, 40))
    without = {key: value for key, value in more.items() if key != "prefill_chunk_size"}
    expected = loaded[1].generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **GREEDY, **without)
    assert torch.equal(loaded[1].generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, **more), expected)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"num_beams": 2}, {}, {"prefill_chunk_size": 16}])
def test_padded_prompts_generate_what_each_does_alone(more, loaded):
    ids, lengths = torch.randint(1, 250, (3, 40)), (40, 9, 25)
    padding = torch.stack([torch.arange(40) >= 40 - length for length in lengths]).long()
    texts = torch.stack([torch.cat([row[length:], row[:length]]) for row, length in zip(ids, lengths, strict=True)])
    batch = loaded[1].generate(texts, attention_mask=padding, **GREEDY, **more)[:, 40:]
    alone = {key: value for key, value in more.items() if key != "prefill_chunk_size"}
    for row, length, result in zip(ids, lengths, batch, strict=True):
        text = row[None, :length]
        expected = loaded[1].generate(text, attention_mask=torch.ones_like(text), **GREEDY, **alone)[0, length:]
        assert torch.equal(result, expected)


@pytest.mark.parametrize("implementation", ["compress_local", "sdpa", "eager"])
@torch.inference_mode()
def test_padding_at_either_side_and_packed_texts_change_nothing(implementation, loaded):
    model, ids, lengths = load_model(loaded[0]), torch.randint(1, 250, (3, 60)), (60, 13, 37)
    model.set_attn_implementation(implementation)
    alone = [model(row[None, :length]).logits[0] for row, length in zip(ids, lengths, strict=True)]
    right = torch.stack([torch.arange(60) < length for length in lengths]).long()
    shifted = torch.stack([row.roll(60 - length) for row, length in zip(ids, lengths, strict=True)])
    after, before = model(ids, attention_mask=right).logits, model(shifted, attention_mask=right.flip(1)).logits
    for row, length in enumerate(lengths):
        torch.testing.assert_close(after[row, :length], alone[row], rtol=0, atol=1e-4)
        torch.testing.assert_close(before[row, 60 - length :], alone[row], rtol=0, atol=1e-4)
    places = torch.cat([torch.arange(25), torch.arange(35)])[None].expand(3, -1)
    packed = model(ids, position_ids=places, use_cache=False).logits
    torch.testing.assert_close(packed[:, 25:], model(ids[:, 25:]).logits, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_cache_can_be_repeated_selected_and_reset(loaded):
    model, ids = loaded[1], torch.randint(1, 250, (2, 40))
    _, cache = stepped(model, ids[:, :30], [20])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    more = model(ids.flip(0)[:, 30:], cache=cache).logits
    torch.testing.assert_close(more, model(ids.flip(0)).logits[:, 30:], rtol=0, atol=1e-4)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model(ids, cache=cache).logits, model(ids).logits)
    with pytest.raises(ValueError, match="cannot be cut"):
        cache.crop(-1)


@torch.inference_mode()
def test_other_caches_are_refused_by_name(loaded):
    model, ids = loaded[1], torch.arange(1, 9)[None]
    with pytest.raises(ValueError, match="StaticCache cannot hold heads with windows of their own: use a DynamicCache"):
        model(ids, cache=transformers.StaticCache(model.config, max_cache_len=32))
    filled = load_model(pico.folder("llama"))(ids).cache
    with pytest.raises(ValueError, match="begin with an empty DynamicCache"):
        model(ids, cache=filled)
    with pytest.raises(ValueError, match="can be cropped"):
        model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY)


def test_loaded_without_this_package_it_computes_the_same(loaded, stock, tmp_path):
    folder, model = loaded
    ids = torch.randint(1, 250, (2, 60))
    with torch.inference_mode():
        torch.save(
            (ids, model(ids).logits, model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)),
            tmp_path / "x.pt",
        )
    out = stock(
        "import torch, transformers\n"
        f"ids, logits, texts = torch.load({str(tmp_path / 'x.pt')!r})\n"
        f"m = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        "cache, steps = transformers.DynamicCache(config=m.config), []\n"
        "with torch.inference_mode():\n"
        "    for piece in torch.tensor_split(ids, list(range(30, 60)), 1):\n"
        "        steps.append(m(piece, cache=cache).logits)\n"
        f"    same = m.generate(ids, attention_mask=torch.ones_like(ids), **{GREEDY!r})\n"
        "    print(float((m(ids).logits - logits).abs().max()), float((torch.cat(steps, 1) - logits).abs().max()))\n"
        "print(torch.equal(same, texts), cache.layers[1].local_keys.shape[2])\n"
    )
    assert max(map(float, out.split()[:2])) < 1e-4
    assert out.split()[2:] == ["True", "20"]


def endless(family="llama", positions=24, **more):
    """A pico model all of whose heads are local: windows of 8 and 2 first tokens."""
    base = open_checkpoint(pico.folder(family, **more))
    heads = model_map(base.spec).kv_heads
    values = {"window": 8, "sinks": 2, "heads": heads, "full": [], "pattern": "window", "positions": positions}
    return Derived(base, localised(base.spec, dict.fromkeys(attentions(base.spec), values)), base.tensor)


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {}),
        ("olmo3", {"layer_types": ["full_attention"]}),
        ("gpt_neox", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}}),
    ],
)
@torch.inference_mode()
def test_beyond_the_trained_length_sinks_stay_at_its_distance(family, more):
    """Keys and values of a single block depend on their own token alone, so the stock model is the reference: it reads the
    tokens in sight, those of the window at the last places of the training."""
    checkpoint = endless(family, num_hidden_layers=1, **more)
    stock = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.folder).eval()
    model, ids = load_checkpoint(checkpoint), torch.randint(1, 250, (2, 60))
    logits = model(ids).logits
    for place in (9, 10, 23, 24, 25, 40, 59):
        first = max(2, place - 7)
        seen = torch.cat([ids[:, :2], ids[:, first : place + 1]], 1)
        shift = max(0, place - 23)
        places = torch.cat([torch.arange(2), torch.arange(first, place + 1) - shift])[None]
        whole = torch.ones(2, 1, seen.shape[1], seen.shape[1], dtype=torch.bool).tril()  # gaps are not borders of texts
        expected = stock(seen, position_ids=places, attention_mask=whole).logits[:, -1]
        assert difference(logits[:, place], expected) < 1e-5


@torch.inference_mode()
def test_models_of_several_copies_of_the_modelling_file_live_in_one_process(loaded):
    folder, model = loaded
    ids = torch.randint(1, 250, (1, 40))
    before = model(ids).logits
    bundled = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    for each in (model, bundled):  # the copy that was loaded last is in transformers' table
        assert difference(each(ids).logits, before) < 1e-5
        assert difference(stepped(each, ids, [30, *range(31, 40)])[0], before) < 1e-5


@torch.inference_mode()
def test_endless_text_is_the_same_at_once_in_pieces_and_padded():
    model, ids = load_checkpoint(endless()), torch.randint(1, 250, (1, 100))
    at_once = model(ids).logits
    logits, cache = stepped(model, ids, [20, 50, *range(51, 100)])
    assert difference(logits, at_once) < 1.5e-5
    assert {layer.local_keys.shape[2] for layer in cache.layers} == {10}
    unturned = load_checkpoint(endless(positions=1000))
    assert torch.equal(model(ids[:, :24]).logits, unturned(ids[:, :24]).logits)
    assert difference(at_once[:, :24], unturned(ids).logits[:, :24]) < 1e-5
    assert difference(at_once[:, 60:], unturned(ids).logits[:, 60:]) > 0.01
    padding = torch.cat([torch.zeros(1, 30), torch.ones(1, 100)], 1).long()
    padded = model(torch.cat([ids[:, :30], ids], 1), attention_mask=padding).logits
    assert difference(padded[:, 30:], at_once) < 1e-5


def test_gradients_through_windows_are_those_of_hand_made_masks(loaded):
    model, ids = load_model(loaded[0]).train(), torch.randint(1, 250, (2, 60))
    stock = masked(local(), 60).train()
    expected = torch.autograd.grad(stock(ids, labels=ids).loss, [*stock.parameters()])
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        found = torch.autograd.grad(model(ids, labels=ids, use_cache=False).loss, [*model.parameters()])
        for one, other in zip(found, expected, strict=True):
            assert difference(one, other) < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda edit: edit["values"].update(window=0), "damaged edit: local"),
        (lambda edit: edit["values"].update(sinks=-1), "damaged edit: local"),
        (lambda edit: edit["values"].update(sinks=True), "damaged edit: local"),
        (lambda edit: edit["values"].update(full=[1, 0]), "damaged edit: local"),
        (lambda edit: edit["values"].update(full=[0, 1]), "damaged edit: local"),
        (lambda edit: edit["values"].update(full="0"), "damaged edit: local"),
        (lambda edit: edit["values"].update(pattern="spiral"), "damaged edit: local"),
        (lambda edit: edit["values"].update(pattern="strided"), "damaged edit: local"),
        (lambda edit: edit["values"].update(pattern="fixed", keep=17), "damaged edit: local"),
        (lambda edit: edit["values"].pop("positions"), "damaged edit: local"),
        (lambda edit: edit["values"].update(heads=3), "has 2 key and value heads, not 3"),
        (lambda edit: edit.update(module="model.layers.9.self_attn"), "is not an attention of a block"),
        (lambda edit: edit.update(module="model.layers.1.mlp"), "is not an attention of a block"),
    ],
)
def test_damaged_windows_are_refused(change, message, loaded, tmp_path):
    shutil.copytree(loaded[0], tmp_path / "bad")
    config = json.loads((tmp_path / "bad/config.json").read_text())
    change(config["edits"][0])
    (tmp_path / "bad/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(tmp_path / "bad")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("bloom", "bloom does not call its attention through transformers' table"),
        ("t5", "t5 does not decode token by token"),
        ("bert", "bert does not decode token by token"),
    ],
)
def test_families_without_such_attention_are_refused_by_name(family, message):
    with pytest.raises(PassError, match=message):
        attentions(open_checkpoint(pico.folder(family)).spec)


def test_blocks_with_stock_windows_are_left_out():
    assert list(attentions(open_checkpoint(pico.folder("gemma2")).spec).values()) == [1, 3]
    assert not attentions(open_checkpoint(pico.folder("mistral")).spec)


def test_no_stock_checkpoint_can_hold_windows_of_heads(loaded, tmp_path):
    text = "model.layers.1.self_attn has windows by head, first tokens that stay, or a pattern"
    with pytest.raises(CompressError, match=f"{text}; give windows to whole blocks: `by: layers`"):
        compress.unpack(loaded[0], tmp_path / "dense")
    with pytest.raises(ValueError, match="which no stock class can express"):
        loaded[1].save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    "settings",
    [{"name": "cast", "weights": "fp16"}, {"name": "prune_unstructured", "method": "magnitude", "sparsity": 0.5}],
)
def test_passes_keep_the_windows(settings, loaded, tmp_path):
    settings = dict(settings)
    compress.apply(settings.pop("name"), loaded[0], tmp_path / "after", store="compact", **settings)
    assert open_checkpoint(tmp_path / "after").spec.structure.edits == open_checkpoint(loaded[0]).spec.structure.edits


def test_calibration_runs_blocks_with_windows(loaded, tmp_path):
    ids = torch.randint(1, 250, (4, 40))
    compress.apply(
        "prune_unstructured", loaded[0], tmp_path / "after", store="compact", data=ids, method="wanda", sparsity=0.5
    )
    assert len(open_checkpoint(tmp_path / "after").spec.structure.edits) == 3


@pytest.mark.slow
def test_distillation_trains_a_model_with_windows(loaded, tmp_path):
    ids, details = torch.randint(1, 250, (24, 32)), {}
    settings = {"steps": 2, "batch_size": 4, "validation_samples": 8, "evaluate_every": 1, "allow_noop": True}
    teacher = str(pico.folder("llama", max_position_embeddings=512))
    out = compress.apply(
        "distill", loaded[0], tmp_path / "out", data=ids, store="compact", teacher=teacher, details=details, **settings
    )
    assert details["training"]["steps"] == 2
    assert len(open_checkpoint(out).spec.structure.edits) == 3


def test_removing_heads_is_refused(loaded, tmp_path):
    with pytest.raises(PassError, match=r"prune_structured cannot change this checkpoint: .* windows by head"):
        compress.apply("prune_structured", loaded[0], tmp_path / "after", store="compact", mlp="25%")
