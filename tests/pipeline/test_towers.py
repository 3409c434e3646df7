"""Encoder-decoders, multimodal wrappers, hybrids and families without a record: one calibrated recipe each, from files to a reload by stock transformers."""

from __future__ import annotations

import array
import json
import math
import wave
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import compress
from compress.checkpoint.open import open_checkpoint
from compress.errors import DataError, PassError
from compress.models.loading import load_model
from compress.models.pico import pico_model
from compress.models.shrink import default_config, shrunken
from tests import pico

#: Model type ▶ class, and how it is calibrated.
CASES = {
    "whisper": ("WhisperForConditionalGeneration", "speech"),
    "gemma3": ("Gemma3ForConditionalGeneration", "text"),
    "jamba": ("JambaForCausalLM", "text"),
    "m2m_100": ("M2M100ForConditionalGeneration", "pairs"),
    "olmo2": ("Olmo2ForCausalLM", "text"),
    "bart": ("BartForConditionalGeneration", "text"),
    "falcon_h1": ("FalconH1ForCausalLM", "text"),
    "qwen3_next": ("Qwen3NextForCausalLM", "text"),
    "lfm2": ("Lfm2ForCausalLM", "text"),
    "mamba2": ("Mamba2ForCausalLM", "text"),
    "llava": ("LlavaForConditionalGeneration", "text"),
    "paligemma": ("PaliGemmaForConditionalGeneration", "text"),
    "idefics3": ("Idefics3ForConditionalGeneration", "text"),
    "mllama": ("MllamaForConditionalGeneration", "text"),
    "deepseek_v4": ("DeepseekV4ForCausalLM", "text"),
}
REFUSED = {
    "pegasus_x": "PegasusXForConditionalGeneration",
    "zamba2": "Zamba2ForCausalLM",
}
#: Stock transformers reads weights of their layers as floats, so that codes are for `store: compact`.
FLOATS = ("mamba2",)
#: Tokens of a prompt see each other both ways, so that single steps differ from one shot in stock models too.
WITHOUT_ORDER = ("paligemma",)
#: One recipe each in the fast tests: three are rounded, two are pruned.
FAST = ("whisper", "gemma3", "olmo2", "jamba", "m2m_100")
PASSES = [
    {"prune_unstructured": {"method": "sparsegpt", "sparsity": 0.5}},
    {"cast": {"weights": "int8", "method": "gptq", "group_size": "channel"}},
]


def save(folder: Path, kind: str, cls: str | None = None) -> Path:
    """A pico checkpoint with the tokenizer of the tests, and a feature extractor where it reads sound."""
    model = pico_model(getattr(transformers, cls or CASES[kind][0]), shrunken(default_config(kind)))
    model.save_pretrained(folder)
    pico.tokenizer().save_pretrained(folder)
    if kind == "whisper":
        frames = 2 * model.config.max_source_positions
        extractor = transformers.WhisperFeatureExtractor(
            feature_size=model.config.num_mel_bins,
            sampling_rate=40 * frames,
            hop_length=40,
            chunk_length=1,
            n_fft=400,
        )
        extractor.save_pretrained(folder)
    return folder


def data(folder: Path, kind: str) -> dict[str, Any]:
    """A calibration section, and its files."""
    folder.mkdir()
    if kind == "speech":
        for i in range(4):
            sound = array.array("h", [int(8000 * math.sin(t * (i + 1) / 20)) for t in range(3000)])
            with wave.open(str(folder / f"{i}.wav"), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(8000)
                file.writeframes(sound.tobytes())
            if i:
                (folder / f"{i}.txt").write_text("a word " * i)
        return {"speech": str(folder), "samples": 4}
    if kind == "pairs":
        rows = [{"de": "ein Satz " * (i % 3 + 1), "en": "a sentence of words " * (i % 2 + 1)} for i in range(8)]
        (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return {"files": [str(folder / "pairs.jsonl")], "text": ["de", "en"], "samples": 8, "length": 20}
    (folder / "text.txt").write_text(" ".join(f"word{i * 37 % 101}" for i in range(400)))
    return {"files": [str(folder / "text.txt")], "samples": 8, "length": 16}


def inputs(model: Any) -> dict[str, torch.Tensor]:
    ids = (torch.arange(20) * 7 % 250)[None]
    if model.main_input_name == "input_features":
        shape = (1, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        return {"input_features": torch.linspace(-1, 1, math.prod(shape)).view(shape).sin(), "decoder_input_ids": ids}
    return {"input_ids": ids} | ({"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {})


#: Loads each checkpoint by its class, and gives the differences of its logits from given ones, and from those of a prompt and
#: single tokens through the cache.
RELOAD = """
import json, sys, torch, transformers
torch.set_num_threads(1)
result = {}
for kind, (cls, folder) in json.loads(sys.argv[1]).items():
    model, info = getattr(transformers, cls).from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    given, wanted = torch.load(folder + "/expected.pt")
    key = "decoder_input_ids" if "decoder_input_ids" in given else "input_ids"
    ids, rest = given[key], {k: v for k, v in given.items() if k != key}
    steps, cached = [], {}
    with torch.no_grad():
        once = model(**given).logits
        if key == "decoder_input_ids":
            rest = {"encoder_outputs": (model(**given).encoder_last_hidden_state,)}
        for piece in (ids[:, :4], *ids[:, 4:].split(1, 1)):
            out = model(**{key: piece}, **rest, **cached, use_cache=True)
            name = "cache" if getattr(out, "cache", None) is not None else "past_key_values"
            name = name if getattr(out, name, None) is not None else "cache_params"
            cached = {name: getattr(out, name)}
            steps.append(out.logits)
    scale = wanted.abs().max()
    result[kind] = [float((once - wanted).abs().max() / scale), float((torch.cat(steps, 1) - once).abs().max() / scale)]
print(json.dumps(result))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kinds", "passes"),
    [(FAST[:3], PASSES[1:]), (FAST[3:], PASSES[:1]), pytest.param(tuple(CASES), PASSES, marks=pytest.mark.slow)],
    ids=["gptq", "sparsegpt", "both"],
)
def test_calibrated_recipes_reload_in_stock_transformers(kinds, passes, tmp_path):
    from tests import processes

    cases = {}
    for kind in kinds:
        cls, calibration = CASES[kind]
        model, out = save(tmp_path / f"{kind}-in", kind), tmp_path / kind
        section = data(tmp_path / f"{kind}-data", calibration)
        recipe = {
            "model": str(model),
            "output": str(out),
            "data": {"calibration": section},
            "passes": passes[: 1 if kind in FLOATS else 2],
            "evaluate": [],
        }
        report = compress.run(recipe).report
        details = [row for s in report["stages"] for p in s["passes"] for row in (p["details"] or {}).get("blocks", ())]
        errors = [t["error"] for row in details for t in row.get("tensors", {}).values() if t.get("error") is not None]
        assert errors, kind
        assert all(0 < error < 1 for error in errors), kind
        original, result = load_model(model, dtype="float32"), load_model(out, dtype="float32")
        given = inputs(original)
        with torch.no_grad():
            before, after = original(**given).logits, result(**given).logits
        assert (before - after).abs().max() > 1e-3 * before.abs().max()
        torch.save((given, after), out / "expected.pt")
        cases[kind] = [cls, str(out)]
    done = processes.run(RELOAD, json.dumps(cases), foreign=True, folder="/")
    assert done.returncode == 0, done.stderr[-2000:]
    for kind, (difference, stepped) in json.loads(done.stdout.splitlines()[-1]).items():
        assert difference < 1e-4, kind
        assert stepped < 1e-3 or kind in WITHOUT_ORDER, kind


@pytest.mark.parametrize(
    ("kind", "calibration", "message"),
    [
        pytest.param(
            "whisper",
            "text",
            r"WhisperForConditionalGeneration reads sound .*; name a folder of .wav files: `speech`",
            marks=pytest.mark.slow,
        ),
        ("m2m_100", "speech", "M2M100ForConditionalGeneration reads `input_ids`, not sound; name `files`"),
    ],
)
def test_calibration_of_another_kind_is_refused_by_the_plan(kind, calibration, message, tmp_path):
    model, section = save(tmp_path / "in", kind), data(tmp_path / "data", calibration)
    recipe = {"model": str(model), "output": str(tmp_path / "out"), "data": {"calibration": section}, "passes": PASSES}
    with pytest.raises(DataError, match=message):
        compress.plan({**recipe, "evaluate": []})


@pytest.mark.slow
def test_towers_are_left_and_rounded_where_they_are_named(tmp_path):
    """Text reaches no tower of images: the pass leaves it, and a method without calibration rounds it if asked."""
    model = save(tmp_path / "in", "gemma3")
    before = open_checkpoint(model)
    towers = {name for name in before.spec.tensors if "vision_tower" in name or "multi_modal_projector" in name}
    section = data(tmp_path / "data", "text")
    compress.apply(
        "prune_unstructured", model, tmp_path / "pruned", data=section["files"], samples=4, length=16, sparsity=0.5
    )
    pruned = open_checkpoint(tmp_path / "pruned")
    assert towers
    assert all(torch.equal(pruned.tensor(n).data, before.tensor(n).data) for n in towers)
    named = {"only": ["re:.*vision_tower.*(fc1|q_proj)"], "activations": "int8"}  # SigLIP takes no packed codes
    compress.apply("cast", model, tmp_path / "cast", weights="int8", method="rtn", **named)
    cast = open_checkpoint(tmp_path / "cast").spec.tensors
    coded = {name for name, tensor in cast.items() if tensor.quant_format is not None}
    assert coded
    assert all("vision_tower" in name for name in coded)
    settings = {
        "data": section["files"],
        "samples": 4,
        "length": 16,
        "only": ["re:.*vision_tower.*fc1"],
        "sparsity": 0.5,
    }
    with pytest.raises(PassError, match=r"vision_tower.*fc1.weight .*; use `method: magnitude`"):
        compress.apply("prune_unstructured", model, tmp_path / "tower", **settings)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "pegasus_x",
            r"model.encoder.layers.0 hands more than its hidden states to later blocks; use a method that needs",
        ),
        ("zamba2", r"block \d lacks shared_transformer.* after loading"),
    ],
)
@pytest.mark.slow
def test_models_whose_blocks_exchange_more_are_refused_by_name(kind, message, tmp_path):
    model, section = save(tmp_path / "in", kind, REFUSED[kind]), data(tmp_path / "data", "text")
    with pytest.raises(PassError, match=message):
        compress.apply(
            "prune_unstructured", model, tmp_path / "out", data=section["files"], samples=4, length=16, sparsity=0.5
        )
    assert not (tmp_path / "out").exists()
