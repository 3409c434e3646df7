"""Latent attention in stock classes: equal to the original, or to the original with projected keys and values."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress.architectures.cache import cache_values
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.write import stored_form
from compress.data.batches import Batches
from compress.errors import CheckpointError, CompressError, PassError
from compress.models.loading import load_model
from compress.passes.latent_attention.moments import MomentFiles
from compress.passes.latent_attention.solve import components, projections
from compress.solvers.latent import rotary, unrotary
from compress.workspace import Workspace
from tests import pico
from tests.toolbox import apply, divergence, edit_config, plan, write

PROMPT, STEPS = 10, 20
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
BIASES = {"attention_bias": True, "mlp_bias": True}
#: Name ▶ (family, changes of its config, target).
CASES = {
    "llama": ("llama", {}, "minicpm3"),
    "llama, deepseek": ("llama", {}, "deepseek_v3"),
    "own keys for each head": ("llama", {"num_key_value_heads": 4}, "minicpm3"),
    "one key": ("llama", {"num_key_value_heads": 1}, "minicpm3"),
    "biases": ("llama", BIASES, "minicpm3"),
    "biases, deepseek": ("llama", {"attention_bias": True}, "deepseek_v3"),
    "tied": ("llama", {"tie_word_embeddings": True}, "minicpm3"),
    "llama3": ("llama", {"rope_parameters": LLAMA3}, "minicpm3"),
    "yarn": ("llama", {"rope_parameters": YARN}, "deepseek_v3"),
    "linear": ("llama", {"rope_parameters": LINEAR}, "minicpm3"),
    "mistral": ("mistral", {"sliding_window": None}, "minicpm3"),
    "wide heads": ("mistral", {"sliding_window": None, "head_dim": 10}, "minicpm3"),
    "qwen2": ("qwen2", {"use_sliding_window": False}, "minicpm3"),
    "qwen2, deepseek": ("qwen2", {"use_sliding_window": False}, "deepseek_v3"),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "minicpm3"),
}
#: Those that others hold the parts of: further families and scalings of positions, the other target.
SLOW = CASES.keys() - {"llama", "yarn"}
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
    scale = float(y.abs().max())
    result[name] = {
        "class": type(m).__name__,
        "keys": sorted(str(key) for keys in info.values() for key in keys),
        "at once": float((x - y).abs().max()) / scale,
        "stepwise": float((torch.cat(steps, 1) - y).abs().max()) / scale,
        "cached": sum(t.numel() for layer in cache.layers for t in (layer.keys, layer.values)),
    }
print(json.dumps(result))
"""


def whole(family, changes):
    """Numbers of keys, and of values, per token and block."""
    config = pico.config(family, **changes)
    return config.num_key_value_heads * (getattr(config, "head_dim", None) or 8)


@pytest.fixture(scope="module")
def results(request, tmp_path_factory, stock, data):
    """Name of a case of this run ▶ what stock transformers computes in a process without this package."""
    root, listed = tmp_path_factory.mktemp("latent"), {}
    users = [x for x in request.session.items if x.path == request.path and "results" in x.fixturenames]
    for number, name in enumerate(item.callspec.params["name"] for item in users):
        family, changes, target = CASES[name]
        folder, width = pico.folder(family, **changes), whole(family, changes)
        converted = apply(
            open_checkpoint(folder), "latent_attention", data=data, work=root / f"work{number}",
            keys=width, values=width, target=target, repair="none",
        )  # fmt: skip
        write(converted, root / str(number))
        y = pico.logits(load_model(folder), PROMPT + STEPS)
        torch.save(((torch.arange(y.shape[1]) * 7 % 250)[None], y, PROMPT), root / f"{number}.pt")
        listed[name] = (str(root / str(number)), str(root / f"{number}.pt"))
    return json.loads(stock(f"LISTED = {listed!r}\n{STEPWISE}").splitlines()[-1])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CASES]
)
def test_whole_cache_computes_what_the_original_does(name, results):
    result, (family, changes, target) = results[name], CASES[name]
    assert result["class"] == {"minicpm3": "MiniCPM3ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}[target]
    assert result["keys"] == []
    assert result["at once"] <= 1e-5
    assert result["stepwise"] <= 1e-5
    assert result["cached"] == 4 * (PROMPT + STEPS) * (2 * whole(family, changes) + 1)


def test_fewer_numbers_are_the_original_with_projected_keys_and_values(tmp_path, data):
    """The dense twin: keys keep their components within each frequency, values theirs around their mean."""
    folder = pico.save(tmp_path / "in", "llama", **BIASES)
    checkpoint, details = open_checkpoint(folder), {}
    settings = {"keys": 12, "values": 10, "repair": "none"}
    converted = apply(checkpoint, "latent_attention", data=data, work=tmp_path / "work", details=details, **settings)
    files = MomentFiles(Workspace(tmp_path / "work/moments/blocks-moments"), "cpu")
    tensors = load_file(folder / "model.safetensors")
    for i in range(4):
        own, moments = projections(checkpoint, i, "cpu"), files.of(i)
        parts, rows = components(own, moments), rotary(own.key, own.groups)
        for f, count in enumerate(details["latent"]["counts"]):
            rows[:, f] = parts.keys.decode[f, :, :count] @ parts.keys.encode[f, :count] @ rows[:, f]
        projected = parts.values.decode[:, :10] @ parts.values.encode[:10]
        mean = own.value @ moments.by_value[:, -1]
        value = projected @ own.value
        value[:, -1] += mean - projected @ mean
        for module, matrix in (("k_proj", unrotary(rows)), ("v_proj", value)):
            start = f"model.layers.{i}.self_attn.{module}"
            tensors[f"{start}.weight"], tensors[f"{start}.bias"] = matrix[:, :-1].float(), matrix[:, -1].float()
    twin = pico.save(tmp_path / "twin", "llama", **BIASES)
    save_file({n: t.contiguous() for n, t in tensors.items()}, twin / "model.safetensors", {"format": "pt"})
    stored = write(converted, tmp_path / "out")
    expected = pico.logits(load_model(twin))
    assert (pico.logits(load_model(stored.folder)) - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert (pico.logits(load_model(folder)) - expected).abs().max() > 0.01 * expected.abs().max()
    assert cache_values(stored.spec, 7) == 7 * 4 * 23


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_floats_lose_no_more_than_the_original_does(tmp_path, data, dtype):
    folder = pico.folder("llama", dtype=dtype, num_key_value_heads=4)
    settings = {"keys": 32, "values": 32, "repair": "none"}
    out = write(
        apply(open_checkpoint(folder), "latent_attention", data=data, work=tmp_path / "w", **settings), tmp_path / "o"
    )
    exact = pico.logits(load_model(folder, dtype="float32"))
    ours, theirs = (((pico.logits(load_model(f)).float() - exact).norm() / exact.norm()) for f in (out.folder, folder))
    assert ours <= 1.6 * theirs


@pytest.mark.parametrize(
    ("target", "changes"),
    [
        ("minicpm3", {}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("deepseek_v3", BIASES), ("minicpm3", BIASES), ("deepseek_v3", {}))
        ),
    ],
)
def test_plan_with_given_ranks_is_exact_to_the_byte(tmp_path, data, target, changes):
    if target == "deepseek_v3" and changes:
        changes = {"attention_bias": True}
    checkpoint = open_checkpoint(pico.folder("llama", **changes))
    settings = {"keys": 10, "values": 7, "target": target, "repair": "none"}
    planned = plan(checkpoint, "latent_attention", **settings)
    assert planned.exact
    out = write(apply(checkpoint, "latent_attention", data=data, work=tmp_path / "work", **settings), tmp_path / "out")
    spec, layout = stored_form(planned, "stock", 1 << 40, checkpoint.metadata)
    assert dict(out.spec.tensors) == dict(spec.tensors)
    assert layout.bytes == sum((out.folder / file).stat().st_size for file in out.files)
    assert cache_values(planned, 5) == cache_values(out.spec, 5) == 5 * 4 * 18


@pytest.mark.slow
def test_max_cache_is_divided_by_trials_and_never_exceeded(tmp_path, data):
    checkpoint, details = open_checkpoint(pico.folder("llama")), {}
    settings = {"max_cache": 0.75, "repair": "none"}
    out = write(
        apply(checkpoint, "latent_attention", data=data, work=tmp_path / "work", details=details, **settings),
        tmp_path / "out",
    )
    planned, choice = plan(checkpoint, "latent_attention", **settings), details["latent"]
    assert not planned.exact
    assert cache_values(planned, 8) == cache_values(out.spec, 8) == 8 * 4 * choice["cached"]
    assert choice["cached"] == 24 == choice["keys"] + choice["values"] + 1
    best = min(choice["tried"], key=lambda row: row["divergence"])
    assert (best["keys"], best["values"]) == (choice["keys"], choice["values"])
    held = data.last(12)
    assert divergence(checkpoint.folder, out.folder, held.ids) == pytest.approx(best["divergence"], rel=1e-3)


@pytest.mark.slow
def test_tuning_helps_and_leaves_the_constant_channel(tmp_path, data):
    checkpoint, details = open_checkpoint(pico.folder("llama")), {}
    sizes = {"keys": 12, "values": 10}
    plain = apply(checkpoint, "latent_attention", data=data, work=tmp_path / "a", repair="none", **sizes)
    tuned = apply(
        checkpoint, "latent_attention", data=data, work=tmp_path / "b", details=details, tune_epochs=4, **sizes
    )
    folders = [write(one, tmp_path / name).folder for name, one in (("plain", plain), ("tuned", tuned))]
    losses = [divergence(checkpoint.folder, folder, data.ids) for folder in folders]
    assert losses[1] < 0.8 * losses[0]
    assert all(row["tuning"]["after"] < row["tuning"]["before"] for row in details["blocks"])
    for i in range(4):
        start = f"model.layers.{i}.self_attn.kv_a"
        for name in (f"{start}_layernorm.weight", f"{start}_proj_with_mqa.bias"):
            assert torch.equal(plain.tensor(name).data, tuned.tensor(name).data)
        assert not tuned.tensor(f"{start}_proj_with_mqa.weight").data[10].any()


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["measure", "solve", "tune"])
def test_killed_run_resumes_to_the_same_bytes(tmp_path, data, monkeypatch, stop):
    checkpoint = open_checkpoint(pico.folder("llama"))
    settings = {"max_cache": 0.6, "tune_epochs": 1}
    where = {"measure": "moments._measured", "solve": "convert.latent_block", "tune": "convert.reconstruct_block"}[stop]
    module, _, name = f"compress.passes.latent_attention.{where}".rpartition(".")
    real, calls = getattr(__import__(module, fromlist=[name]), name), []

    def stops(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    def run(folder):
        return write(
            apply(checkpoint, "latent_attention", data=data, work=tmp_path / folder, **settings),
            tmp_path / f"{folder}-o",
        )

    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.{name}", stops)
        with pytest.raises(KeyboardInterrupt):
            run("broken")
    files = [(run(folder).folder / "model.safetensors").read_bytes() for folder in ("broken", "whole")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_later_passes_work_on_the_result(tmp_path, data):
    settings = {"keys": 12, "values": 10, "repair": "none"}
    out = write(
        apply(open_checkpoint(pico.folder("llama")), "latent_attention", data=data, work=tmp_path / "w", **settings),
        tmp_path / "o",
    )
    cast = {"weights": "int8", "method": "rtn"}
    planned = plan(out, "cast", **cast)
    smaller = write(apply(out, "cast", **cast), tmp_path / "int8")
    assert {t.name: t.quant_format for t in planned.stored()} == {t.name: t.quant_format for t in smaller.spec.stored()}
    logits = [pico.logits(load_model(one.folder)) for one in (out, smaller)]
    assert (logits[0] - logits[1]).norm() < 0.1 * logits[0].norm()
    narrower = apply(out, "prune_structured", mlp=16, importance="magnitude", compensation="none")
    assert load_model(write(narrower, tmp_path / "mlp").folder).config.intermediate_size == 48
    fewer = apply(out, "prune_structured", layers=[1], compensation="none")
    assert len(load_model(write(fewer, tmp_path / "layers").folder).model.layers) == 3
    with pytest.raises(PassError):
        plan(out, "prune_structured", heads=1, importance="magnitude", compensation="none")
    with pytest.raises(PassError, match="minicpm3 cannot become a model with latent attention"):
        plan(out, "latent_attention", **settings)


@pytest.mark.parametrize(
    ("family", "changes", "settings", "message"),
    [
        ("qwen3", {}, {}, "qwen3 cannot become a model with latent attention; llama"),
        ("bloom", {}, {}, "bloom cannot become"),
        ("t5", {}, {}, "t5 cannot become"),
        ("bert", {}, {}, "bert cannot become"),
        ("qwen2", {}, {}, "no class with sliding windows"),
        ("mistral", {"sliding_window": 6}, {}, "no class with sliding windows"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, {}, "some of its blocks have no rotary positions"),
        ("llama", {"rope_parameters": {**YARN, "rope_type": "dynamic"}}, {}, r"\(dynamic\) depend on the length"),
        ("llama", {"mlp_bias": True}, {"target": "deepseek_v3"}, "the MLPs of deepseek_v3 have no biases"),
        ("llama", {}, {"keys": 18}, "its keys have 16 numbers per token, and 18 are asked for"),
        ("llama", {}, {"values": 17}, "its values have 16 numbers per token, and 17"),
        ("llama", {}, {"max_cache": "5%"}, "5% of 32 numbers per token leaves none"),
        ("llama", {}, {"max_cache": "50%", "only": ["*"]}, "`only` and `skip` do not apply"),
    ],
)
def test_models_and_sizes_that_cannot_are_refused_in_the_plan(tmp_path, family, changes, settings, message):
    checkpoint = open_checkpoint(pico.folder(family, **changes))
    with pytest.raises(CompressError, match=message):
        plan(checkpoint, "latent_attention", **(settings if settings.keys() - {"target"} else {**settings, "keys": 8}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "say how much is cached"),
        ({"keys": 7}, "`keys` must be even"),
        ({"keys": 8, "target": "llama"}, "there is no target `llama`; set minicpm3 or deepseek_v3"),
        ({"max_cache": 0.5, "values": 8}, "not both"),
        ({"max_cache": "150%"}, "share between 0 and 1"),
    ],
)
def test_settings_that_contradict_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        plan(open_checkpoint(pico.folder("llama")), "latent_attention", **settings)


def test_heads_that_do_not_divide_the_width_need_the_other_target():
    checkpoint = open_checkpoint(pico.folder("mistral", sliding_window=None, hidden_size=34, head_dim=8))
    with pytest.raises(PassError, match="needs a hidden size that the number of heads divides"):
        plan(checkpoint, "latent_attention", keys=8)
    plan(checkpoint, "latent_attention", keys=8, target="deepseek_v3")


def test_pruned_attention_and_base_models_are_refused(tmp_path):
    folder = pico.save(tmp_path / "in", "llama")
    pruned = apply(open_checkpoint(folder), "prune_unstructured", method="magnitude", sparsity=0.5)
    with pytest.raises(PassError, match="has weights removed"):
        plan(pruned, "latent_attention", keys=8)
    edit_config(folder, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(CompressError, match="has no class like LlamaForSequenceClassification"):
        plan(open_checkpoint(folder), "latent_attention", keys=8)


def test_damaged_weights_are_named(tmp_path, data):
    folder = pico.save(tmp_path / "in", "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.self_attn.o_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="NaN"):
        apply(open_checkpoint(folder), "latent_attention", data=data, work=tmp_path / "work", keys=8, repair="none")


def test_fewer_tokens_than_channels_are_refused_before_the_work(tmp_path):
    ids = torch.arange(2, 33)[None]
    with pytest.raises(PassError, match="has 31 tokens, and components of 32 channels"):
        compress.apply("latent_attention", pico.folder("llama"), tmp_path / "out", data=ids, max_cache=0.5)
    compress.apply("latent_attention", pico.folder("llama"), tmp_path / "out", data=ids, keys=16, repair="none")


def test_notes_say_what_grows_and_from_where_memory_is_saved():
    from compress import passes

    spec, instance = open_checkpoint(pico.folder("llama")).spec, passes.get("latent_attention")
    settings = instance.settings(keys=12, values=10)
    first, second = instance.plan_notes(spec, settings)
    assert "caches 23 numbers per token, 32 before" in first
    assert "decodes more slowly" in first
    grown = instance.plan(spec, settings).parameters - spec.parameters
    assert f"{grown:,} numbers more" in second
    assert f"from {-(-grown // (4 * 9)):,} cached tokens on" in second


@pytest.mark.slow
def test_padding_does_not_count(tmp_path):
    ids = torch.randint(2, 250, (8, 20), generator=torch.Generator().manual_seed(2))
    padded = torch.cat([ids, torch.full((8, 5), 7)], 1)
    mask = torch.cat([torch.ones(8, 20), torch.zeros(8, 5)], 1).bool()
    checkpoint, found = open_checkpoint(pico.folder("llama")), []
    for name, batches in (("plain", Batches(ids)), ("padded", Batches(padded, mask))):
        apply(checkpoint, "latent_attention", data=batches, work=tmp_path / name, keys=12, values=10, repair="none")
        found.append(MomentFiles(Workspace(tmp_path / name / "moments/blocks-moments"), "cpu").of(2).second)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)
