"""Windows in stock classes: equal to the original under hand-made masks, at once and through the cache, in another process."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from compress import architectures
from compress.architectures.cache import cache_values
from compress.architectures.conversions.windows import current_windows
from compress.architectures.model_map import model_map
from compress.checkpoint.open import open_checkpoint
from compress.models.blocks import find_blocks
from compress.models.loading import load_model
from compress.passes.local_attention.choose import Windows
from compress.passes.local_attention.settings import LocalAttentionSettings
from compress.passes.local_attention.stock import with_windows
from tests import pico
from tests.toolbox import write

WINDOW, PROMPT, STEPS = 8, 13, 20
WINDOWS = (None, WINDOW, None, WINDOW)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "factor": 4.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 64,
}
PLAIN_SETTINGS = LocalAttentionSettings(window=WINDOW, full=[0, 2], sinks=0)
BIASES = {"attention_bias": True, "mlp_bias": True}
PLAIN = {"sliding_window": None}
#: Name ▶ (family, changes of its config, settings, the model type of the result).
CASES = {
    "sinks": ("llama", {}, {"sinks": "learned"}, "granite_swa"),
    "sinks, biases": ("llama", BIASES, {"sinks": "learned"}, "granite_swa"),
    "sinks, llama3": ("llama", {"rope_parameters": LLAMA3}, {"sinks": "learned"}, "granite_swa"),
    "sinks, yarn": ("llama", {"rope_parameters": YARN}, {"sinks": "learned"}, "granite_swa"),
    "sinks, longrope": ("llama", {"rope_parameters": LONG}, {"sinks": "learned"}, "granite_swa"),
    "sinks, mistral": ("mistral", PLAIN, {"sinks": "learned"}, "granite_swa"),
    "sinks, wide": ("mistral", {**PLAIN, "head_dim": 10}, {"sinks": "learned"}, "granite_swa"),
    "sinks, qwen2": ("qwen2", {"use_sliding_window": False}, {"sinks": "learned"}, "granite_swa"),
    "sinks, no positions": ("smollm3", {"no_rope_layers": [1, 0, 0, 1]}, {"sinks": "learned"}, "granite_swa"),
    "sinks, tied": ("llama", {"tie_word_embeddings": True}, {"sinks": "learned"}, "granite_swa"),
    "plain": ("llama", {}, {"sinks": 0}, "ministral"),
    "plain, yarn": ("llama", {"rope_parameters": YARN}, {"sinks": 0}, "ministral"),
    "plain, mistral": ("mistral", PLAIN, {"sinks": 0}, "ministral"),
    "plain, biases": ("llama", BIASES, {"sinks": 0}, "smollm3"),
    "smollm3": ("llama", {}, {"sinks": 0, "target": "smollm3"}, "smollm3"),
    "qwen2": ("llama", {}, {"sinks": 0, "target": "qwen2"}, "qwen2"),
    "cwm": ("llama", {"mlp_bias": True}, {"sinks": 0, "target": "cwm"}, "cwm"),
    "cwm, llama3": ("llama", {"rope_parameters": LLAMA3}, {"sinks": 0, "target": "cwm"}, "cwm"),
    "own qwen2": ("qwen2", {"use_sliding_window": False}, {"sinks": 0}, "qwen2"),
    "own qwen3": ("qwen3", {}, {"sinks": 0}, "qwen3"),
    "own smollm3": ("smollm3", {}, {"sinks": 0}, "smollm3"),
    "own gemma2": ("gemma2", {"layer_types": ["full_attention"] * 4, "sliding_window": 12}, {"sinks": 0}, "gemma2"),
    "own gemma3": (
        "gemma3_text",
        {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 12},
        {"sinks": 0},
        "gemma3_text",
    ),
    "own qwen2_moe": ("qwen2_moe", {}, {"sinks": 0}, "qwen2_moe"),
    "own olmo3": ("olmo3", {"layer_types": ["full_attention"] * 4, "sliding_window": 12}, {"sinks": 0}, "olmo3"),
    "own ministral": ("ministral", PLAIN, {"sinks": 0}, "ministral"),
    "own cwm": ("cwm", {"layer_types": ["full_attention"] * 4, "sliding_window": 12}, {"sinks": 0}, "cwm"),
    "own sinks": (
        "granite_swa",
        {"layer_types": ["full_attention"] * 4, "sliding_window": 12},
        {"sinks": "learned"},
        "granite_swa",
    ),
}


def by_hand(module, query, key, value, attention_mask, scaling, softcap=None, s_aux=None, **kwargs):
    """Eager attention under a mask and with logits that the test sets on the module; all from the formula."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.mT * scaling
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    i = torch.arange(query.shape[2])
    seen = i[:, None] >= i[None]
    if module.window is not None:
        seen &= i[:, None] - i[None] < module.window
    scores = scores.masked_fill(~seen, -torch.inf)
    sinks = module.logits if module.logits is not None else s_aux
    if sinks is not None:
        column = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)
    weights, rest = weights[..., : key.shape[2]], weights[..., key.shape[2] :]
    output = weights @ value
    if module.values is not None:
        output = output + rest * module.values.repeat_interleave(groups, 0)[:, None]
    return output.transpose(1, 2).contiguous(), weights


AttentionInterface.register("by_hand", by_hand)


def expected(folder, windows, sinks, values=None, length=PROMPT + STEPS):
    """Logits of the original model with those windows, and with logits and values of sinks."""
    model = load_model(folder)
    model.set_attn_implementation("by_hand")
    for i, block in enumerate(find_blocks(model, architectures.of(model.config.to_dict()))):
        block.self_attn.window, block.self_attn.logits = windows[i], sinks.get(i)
        block.self_attn.values = (values or {}).get(i)
    return pico.logits(model, length)


STEPWISE = """
import json, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
result = {}
for name, (folder, expected) in LISTED.items():
    ids, y, prompt = torch.load(expected)
    with torch.no_grad():
        m, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        x, cache, steps = m(input_ids=ids).logits, None, []
        for piece in (ids[:, :prompt], *ids[:, prompt:].split(1, 1)):
            out = m(input_ids=piece, use_cache=True, past_key_values=cache)
            cache = out.past_key_values
            steps.append(out.logits)
    result[name] = {
        "class": type(m).__name__,
        "keys": sorted(str(key) for keys in info.values() for key in keys),
        "at once": float((x - y).abs().max()),
        "stepwise": float((torch.cat(steps, 1) - y).abs().max()),
        "cached": sum(t.numel() for layer in cache.layers for t in (layer.keys, layer.values)),
        "generated": [
            m.generate(ids[:, :17], max_new_tokens=8, do_sample=False, eos_token_id=None, prefill_chunk_size=size).tolist()
            for size in (None, 5, 12)
        ],
    }
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory, stock):
    """Name of a case ▶ what stock transformers computes in a process without this package."""
    root = tmp_path_factory.mktemp("windows")
    listed, planned = {}, {}
    for number, (name, (family, changes, settings, model_type)) in enumerate(CASES.items()):
        folder = pico.folder(family, **changes)
        checkpoint = open_checkpoint(folder)
        sinks, values = {}, {}
        if settings["sinks"] == "learned":
            draw, mapped = torch.Generator().manual_seed(number), model_map(checkpoint.spec)
            sinks = {i: torch.randn(4, generator=draw) * 2 for i in (1, 3)}
            values = {i: torch.randn(mapped.kv_heads, mapped.head_dim, generator=draw) for i in (1, 3)}
        asked = LocalAttentionSettings(window=WINDOW, full=[0, 2], **settings)
        stored = write(with_windows(checkpoint, asked, Windows(WINDOWS, sinks, values=values)), root / str(number))
        assert stored.spec.structure.model_type == model_type
        assert current_windows(stored.spec) == WINDOWS
        planned[name] = cache_values(stored.spec, PROMPT + STEPS)
        y = expected(folder, WINDOWS, sinks, values)
        torch.save(((torch.arange(y.shape[1]) * 7 % 250)[None], y, PROMPT), root / f"{number}.pt")
        listed[name] = (str(root / str(number)), str(root / f"{number}.pt"))
    return {"planned": planned, **json.loads(stock(f"LISTED = {listed!r}\n{STEPWISE}").splitlines()[-1])}


def test_windows_show_on_the_sample():
    """What the cases compare would not differ from full attention on a shorter one."""
    folder = pico.folder()
    difference = expected(folder, WINDOWS, {}) - expected(folder, (None,) * 4, {})
    assert difference[:, :WINDOW].abs().max() <= 1e-5
    assert difference[:, WINDOW:].abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_stock_class_matches_original_under_hand_made_masks(name, results):
    found, (family, changes, _, _) = results[name], CASES[name]
    assert found["keys"] == []
    assert found["at once"] <= 1e-4
    assert found["stepwise"] <= 1e-4
    assert found["generated"][0] == found["generated"][1] == found["generated"][2], "prompts in chunks"
    assert found["cached"] == results["planned"][name]
    assert found["cached"] < cache_values(open_checkpoint(pico.folder(family, **changes)).spec, PROMPT + STEPS)


def test_chunks_of_padded_prompts_and_beams_change_nothing(tmp_path):
    """`generate` of the stock class, as the generation config that the pass writes asks for."""
    out = write(with_windows(open_checkpoint(pico.folder()), PLAIN_SETTINGS, Windows(WINDOWS)), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out.folder)
    ids = torch.arange(46).reshape(2, 23) * 7 % 250 + 1
    mask = torch.ones_like(ids)
    ids[1, :9] = mask[1, :9] = 0
    for asked in ({}, {"num_beams": 3}):
        asked |= {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        at_once, chunks = (model.generate(ids, prefill_chunk_size=size, **asked) for size in (None, 5))
        assert at_once.equal(chunks)
