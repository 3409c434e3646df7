"""Causal models with a KV cache: the graph of onnxruntime-genai's model builder, with codes in ``MatMulNBits``."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.exports.base import ExportError
from compress.exports.forward import check_same, exporting
from compress.exports.onnx.graph import GraphCodes, save
from compress.exports.onnx.matrices import Index
from compress.exports.onnx.supported import GRAPH
from compress.exports.twin import float32_twin

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.values import Checkpoint

CONFIG = "genai_config.json"
_BUILDER = "onnxruntime_genai.models.builder"
#: Largest difference of logits, as a share of the largest logit, by accuracy level. Inputs of 8 bits change logits by a few
#: percent in a small model.
TOLERANCE = {1: 1e-3, 4: 0.3}


def write_decoder(checkpoint: Checkpoint, output: Path, work: Path, accuracy: int) -> None:
    """Write the graph and the config of genai into ``output``; ``work`` holds the float32 twin meanwhile.

    Raises:
        ExportError: the builder fails, or its graph computes other values than the model.
        PassError: no stock class can express an edit; codes have no place in the graph.
    """
    import onnx_ir

    from compress.checkpoint.write import write_checkpoint

    write_checkpoint(float32_twin(checkpoint), work / "twin", store="stock")
    _build(work)
    model = onnx_ir.load(work / "built" / "model.onnx")
    GraphCodes(model, Index(checkpoint), accuracy, nbits=True).place()
    config = json.loads((work / "built" / CONFIG).read_text(encoding="utf-8"))
    _fix_cache(model, config["model"]["decoder"]["head_size"])
    path = output / GRAPH
    path.parent.mkdir(parents=True, exist_ok=True)
    save(model, path)
    config["model"]["decoder"]["filename"] = GRAPH
    (output / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    with exporting(str(checkpoint.spec.structure.class_name), "onnxruntime"):
        _check(work / "twin", path, accuracy)


def _fix_cache(model: Any, size: int) -> None:
    """Write the size of heads into the shapes of the cache, where transformers.js looks for it; the builder leaves it free."""
    import onnx_ir

    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name.startswith(("past_key_values", "present")):
            value.shape = onnx_ir.Shape([*list(value.shape)[:3], size])


def _build(work: Path) -> None:
    """Run the builder in a process of its own: it prints, and puts its folder on the path of imports."""
    command = [sys.executable, "-m", _BUILDER, "-i", str(work / "twin"), "-o", str(work / "built")]
    command += ["-p", "fp32", "-e", "cpu", "-c", str(work / "cache")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    if result.returncode:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        raise ExportError(
            f"onnxruntime-genai's builder fails: {' '.join(lines[-1:])[:200]}", fix="export to pt2, or to gguf"
        )


def _check(twin: Path, path: Path, accuracy: int) -> None:
    """Compare logits of a text, read at once and in halves through the cache, with those of the model."""
    import torch

    from compress.models.loading import load_model

    model: Any = load_model(twin, dtype="float32")
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(2, vocabulary, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    del model
    for cuts in ((0, 24), (0, 11, 24)):
        check_same({"logits": wanted}, {"logits": run_cached(path, ids, cuts)}, TOLERANCE[accuracy])


def run_cached(path: Path, ids: torch.Tensor, cuts: tuple[int, ...]) -> torch.Tensor:
    """Logits [1, T, V] of token ids [1, T], read in the parts between ``cuts`` through the KV cache."""
    import numpy as np
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    cached = [each for each in session.get_inputs() if each.name.startswith("past_key_values")]
    heads = {each.name: each.shape for each in cached}
    size = _head_size(path)
    past = {name: np.zeros((1, shape[1], 0, size), np.float32) for name, shape in heads.items()}
    logits = []
    for start, end in itertools.pairwise(cuts):
        inputs = {"input_ids": ids[:, start:end].numpy(), "attention_mask": np.ones((1, end), np.int64), **past}
        wanted = {each.name for each in session.get_inputs()}
        outputs = dict(zip(names, session.run(names, {k: v for k, v in inputs.items() if k in wanted}), strict=True))
        past = {name: outputs[name.replace("past_key_values", "present")] for name in heads}
        logits.append(torch.from_numpy(outputs["logits"]))
    return torch.cat(logits, dim=1)


def _head_size(path: Path) -> int:
    config = json.loads((path.parent.parent / CONFIG).read_text(encoding="utf-8"))
    return int(config["model"]["decoder"]["head_size"])
