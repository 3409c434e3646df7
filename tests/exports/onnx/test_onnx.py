"""Folders of ONNX: onnxruntime computes what stock transformers computes. All need the extra ``onnx``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.checkpoint.open import open_checkpoint
from compress.exports import export, get
from compress.models.loading import load_checkpoint
from compress.progress import SilentProgress
from tests import pico
from tests.toolbox import apply, write

pytest.importorskip("onnxruntime_genai")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.slow

DECODERS = ("llama", "qwen3", "mistral")
IDS = torch.arange(5, 29).reshape(1, -1)


def exported(checkpoint: Any, path: Path, **settings: Any) -> Path:
    target = get("onnx")
    planned = export(checkpoint, "onnx", path, target.settings(**settings), SilentProgress())
    graph = path / "onnx" / "model.onnx"
    assert abs(graph.stat().st_size - planned.bytes) < 120_000  # the graph's nodes, and the table of positions
    return graph


def quantized(family: str, tmp_path: Path, **settings: Any) -> Any:
    changes = {"head_dim": 16} if family in DECODERS else {}
    return write(
        apply(open_checkpoint(pico.folder(family, **changes)), "cast", method="rtn", **settings), tmp_path / "cast"
    )


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"weights": "int4", "group_size": 16}),
        ("qwen3", {"weights": "int8"}),
        ("mistral", {"weights": "int3", "group_size": 8, "skip": ["*v_proj*"]}),
    ],
)
def test_decoder_equals_transformers_at_once_and_through_the_cache(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    from compress.exports.onnx.decoder import run_cached

    checkpoint = quantized(family, tmp_path, **settings)
    graph = exported(checkpoint, tmp_path / "onnx")
    with torch.no_grad():
        wanted = load_checkpoint(checkpoint, dtype="float32")(input_ids=IDS).logits
    whole, halves = run_cached(graph, IDS, (0, 24)), run_cached(graph, IDS, (0, 12, 24))
    assert float((whole - wanted).abs().max()) <= 5e-5
    assert float((whole - halves).abs().max()) <= 1e-5


def test_genai_generates_the_tokens_of_transformers(tmp_path: Path) -> None:
    import onnxruntime_genai as genai

    checkpoint = quantized("llama", tmp_path, weights="int4", group_size=16)
    exported(checkpoint, tmp_path / "onnx")
    model = genai.Model(str(tmp_path / "onnx"))
    options = genai.GeneratorParams(model)
    options.set_search_options(max_length=32, min_length=32, do_sample=False)
    generator = genai.Generator(model, options)
    generator.append_tokens(IDS[:, :8].tolist())
    while not generator.is_done():
        generator.generate_next_token()
    wanted = load_checkpoint(checkpoint, dtype="float32").generate(
        IDS[:, :8], max_length=32, min_length=32, do_sample=False
    )
    assert list(generator.get_sequence(0)) == wanted[0].tolist()


@pytest.mark.parametrize("level", [1, 4])
@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_traced_graph_equals_transformers(family: str, level: int, tmp_path: Path) -> None:
    from compress.exports.forward import forward_of, sample
    from compress.exports.onnx.traced import run

    checkpoint = quantized(family, tmp_path, weights="int8")
    graph = exported(checkpoint, tmp_path / "onnx", accuracy_level=level)
    forward = forward_of(load_checkpoint(checkpoint, dtype="float32"))
    inputs = sample(forward, 3, 9)
    (given,) = run(graph, inputs).values()
    with torch.no_grad():
        (wanted,) = forward(**inputs)
    assert float((given - wanted).abs().max()) <= 5e-5


def test_folder_has_the_configs_that_runtimes_read(tmp_path: Path) -> None:
    checkpoint = quantized("llama", tmp_path, weights="int4", group_size=16)
    exported(checkpoint, tmp_path / "onnx")
    genai = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())
    config = json.loads((tmp_path / "onnx" / "config.json").read_text())
    assert genai["model"]["decoder"]["filename"] == "onnx/model.onnx"
    assert config["transformers.js_config"] == {"dtype": "fp32"}
    assert "quantization_config" not in config
    assert (tmp_path / "onnx" / "tokenizer.json").read_bytes() == (tmp_path / "cast" / "tokenizer.json").read_bytes()
