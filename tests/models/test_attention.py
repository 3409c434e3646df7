"""Models compute with `compress_local` what they compute with transformers' own attention."""

from __future__ import annotations

import pytest
import torch
import transformers

import compress
from compress.errors import CompressError
from compress.models.loading import load_model
from tests import pico

WINDOW = 6
LAYERS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
#: Family ▶ settings with windows; the first layer has one, so that a wrong one shows in all that follows.
WINDOWED = {
    "mistral": {"sliding_window": WINDOW},
    "ministral": {"sliding_window": WINDOW, "layer_types": LAYERS},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": LAYERS},
    "qwen3": {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": LAYERS},
    "gemma2": {"sliding_window": WINDOW, "attn_logit_softcapping": None, "layer_types": LAYERS},
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": LAYERS},
    "granite_swa": {"sliding_window": WINDOW, "layer_types": LAYERS},
    "smollm3": {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": LAYERS},
    "olmo3": {"sliding_window": WINDOW, "layer_types": LAYERS},
    "cwm": {"sliding_window": WINDOW, "layer_types": LAYERS},
    "phi3": {"sliding_window": WINDOW},
    "mixtral": {"sliding_window": WINDOW},
}
TIER = ("mistral", "qwen3", "gemma3_text", "granite_swa")
FAMILIES = [f if f in TIER else pytest.param(f, marks=pytest.mark.slow) for f in WINDOWED]


def both(family):
    """The model with our attention, chosen by `compress.load`, and the one with transformers' eager attention."""
    folder = pico.folder(family, **WINDOWED[family])
    ours = compress.load(folder)
    assert ours.config._attn_implementation == "compress_local"
    return ours, load_model(folder, attention="eager")


def steps(model, ids, sizes, padding=None):
    """Logits [B, T, V] of the tokens read through the cache, so many at a time."""
    cache, logits, end = transformers.DynamicCache(config=model.config), [], 0
    for size in sizes:
        start, end = end, end + size
        mask = None if padding is None else padding[:, :end]
        logits.append(model(ids[:, start:end], attention_mask=mask, cache=cache, use_cache=True).logits)
    return torch.cat(logits, 1)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=float(expected.abs().max()) * 5e-6)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_one_shot_chunks_and_single_steps_equal_stock_attention(family):
    ours, stock = both(family)
    for module in ours.modules():
        if hasattr(module, "sinks"):
            assert module.sinks.abs().sum() > 0
    ids = torch.randint(0, 250, (2, 41), generator=torch.Generator().manual_seed(0))
    expected = stock(ids).logits
    close(ours(ids).logits, expected)
    close(steps(ours, ids, [17, 7, *[1] * 17]), expected)
    padding = torch.ones_like(ids)
    padding[0, :9] = 0
    real = padding.bool()
    expected = stock(ids, attention_mask=padding).logits
    for sizes in ([41], [17, 7, *[1] * 17]):
        got = steps(ours, ids, sizes, padding)
        close(got[real], expected[real])


@pytest.mark.parametrize("family", pico.families(WINDOWED, tier=("mistral",)))
@torch.no_grad()
def test_generation_and_beams_equal_stock_attention(family):
    ours, stock = both(family)
    ids = torch.randint(1, 250, (2, 13), generator=torch.Generator().manual_seed(1))
    padding = torch.ones_like(ids)
    padding[0, :5] = 0
    for more in ({"num_beams": 3}, {"prefill_chunk_size": 4}):
        arguments = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": 299, **more}
        for mask in (torch.ones_like(ids), padding):
            if "prefill_chunk_size" in more and not mask.all():
                continue
            expected = stock.generate(ids, attention_mask=mask, **arguments)
            assert torch.equal(ours.generate(ids, attention_mask=mask, **arguments), expected)


@torch.no_grad()
def test_a_static_cache_is_computed_by_masks_as_in_stock():
    ours, stock = both("granite_swa")
    ids = torch.randint(1, 250, (2, 13), generator=torch.Generator().manual_seed(1))
    arguments = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    arguments["disable_compile"] = True
    assert torch.equal(ours.generate(ids, **arguments), stock.generate(ids, **arguments))


@torch.no_grad()
def test_packed_texts_keep_apart():
    ours, stock = both("qwen3")
    ids, places = torch.arange(20)[None], torch.cat([torch.arange(12), torch.arange(8)])[None]
    close(ours(ids, position_ids=places).logits, stock(ids, position_ids=places).logits)


@pytest.mark.parametrize("family", ["qwen3", "granite_swa"])
def test_gradients_equal_stock_attention(family):
    grads = []
    for model in both(family):
        ids = torch.randint(0, 250, (2, 33), generator=torch.Generator().manual_seed(0))
        padding = torch.ones_like(ids)
        padding[0, :5] = 0
        model.train()
        labels = ids.clone()
        labels[0, :6] = -100  # the last token of padding predicts the first of the text
        loss = model(ids, labels=ids).loss + model(ids, attention_mask=padding, labels=labels).loss
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for mine, reference in zip(*grads, strict=True):
        assert (mine - reference).norm() <= 1e-4 * reference.norm() + 1e-7


@pytest.mark.slow
@torch.no_grad()
def test_compiled_models_compute_the_same():
    ours, _ = both("granite_swa")
    ids = torch.randint(0, 250, (1, 21), generator=torch.Generator().manual_seed(0))
    expected = ours(ids).logits
    compiled = torch.compile(ours, backend="eager")
    close(compiled(ids).logits, expected)
    with torch.inference_mode():
        close(ours(ids).logits, expected)


def test_auto_takes_it_for_windows_where_it_computes_the_same():
    def chosen(family, **changes):
        return compress.load(pico.folder(family, **changes)).config._attn_implementation

    assert chosen("llama") == "sdpa"
    assert chosen("gpt2") == "sdpa"
    assert chosen("bert") == "sdpa"
    assert chosen("mistral", sliding_window=6) == "compress_local"
    assert chosen("mistral", sliding_window=None) == "sdpa"
    assert chosen("mistral", sliding_window=6, attention_dropout=0.1) == "sdpa"
    assert chosen("gemma2") == "eager"  # its scores are capped
    assert load_model(pico.folder("mistral", sliding_window=6)).config._attn_implementation == "sdpa"
    assert load_model(pico.folder("llama"), attention="compress_local").config._attn_implementation == "compress_local"


@pytest.mark.parametrize(
    ("family", "attention", "message"),
    [
        ("llama", "flash", "no attention function is called 'flash'; give auto, compress_local, sdpa or eager"),
        ("gemma2", "compress_local", "its scores are capped (attn_logit_softcapping)"),
        ("bloom", "compress_local", "not called through transformers' table"),
        ("bert", "compress_local", "not a causal language model"),
    ],
)
def test_what_it_does_not_compute_is_refused_on_loading(family, attention, message):
    with pytest.raises(CompressError) as raised:
        load_model(pico.folder(family), attention=attention)
    assert message in str(raised.value)


def test_arguments_that_it_does_not_know_are_refused_by_name():
    model, _ = both("mistral")
    with pytest.raises(ValueError, match="compress_local does not compute cu_seq_lens_q"):
        model(torch.arange(9)[None], cu_seq_lens_q=torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="compress_local does not compute output_attentions"):
        model(torch.arange(9)[None], output_attentions=True)


@pytest.mark.slow
def test_the_bundled_file_registers_it_and_stock_loading_takes_it(tmp_path, stock):
    from compress.checkpoint.open import open_checkpoint
    from compress.checkpoint.write import write_checkpoint
    from tests.toolbox import prune

    folder = pico.folder("mistral", sliding_window=6)
    write_checkpoint(prune(open_checkpoint(folder), sparsity=0.6), tmp_path / "out", store="compact")
    out = stock(
        "import torch, transformers\n"
        "ids = torch.arange(30)[None]\n"
        "load = transformers.AutoModelForCausalLM.from_pretrained\n"
        f"eager = load({str(tmp_path / 'out')!r}, trust_remote_code=True, attn_implementation='eager')\n"
        f"ours = load({str(tmp_path / 'out')!r}, trust_remote_code=True, attn_implementation='compress_local')\n"
        "print(ours.config._attn_implementation)\n"
        "print(float((ours(ids).logits - eager(ids).logits).abs().max()) < 1e-4)\n"
    )
    assert out.split() == ["compress_local", "True"]
    compress.register_attention()
    ours = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="compress_local")
    with torch.no_grad():
        close(ours(torch.arange(30)[None]).logits, load_model(folder, attention="eager")(torch.arange(30)[None]).logits)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}),
        ("llama4_text", {"attention_chunk_size": 6, "num_local_experts": 2, "intermediate_size_mlp": 64}),
        ("cohere2", {"sliding_window": 6}),
        ("qwen2_moe", {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 2, "num_experts": 4}),
    ],
)
@pytest.mark.slow
@torch.no_grad()
def test_families_without_a_window_in_their_record_compute_the_same(family, changes):
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 299}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **sizes, **heads, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.normal_(0, 0.3) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    ids = torch.randint(0, 250, (2, 41), generator=torch.Generator().manual_seed(0))
    padding = torch.ones_like(ids)
    padding[0, :9] = 0
    expected = model(ids).logits, model(ids, attention_mask=padding).logits[padding.bool()]
    compress.register_attention()
    model.set_attn_implementation("compress_local")
    close(model(ids).logits, expected[0])
    close(steps(model, ids, [17, 7, *[1] * 17]), expected[0])
    close(steps(model, ids, [17, 7, *[1] * 17], padding)[padding.bool()], expected[1])
