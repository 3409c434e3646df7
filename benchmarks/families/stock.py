"""The process that loads checkpoints as a user without this package does: transformers alone, for any number of them.

A script: reads requests, JSON, one a line, and answers each with a line. It must import neither `compress` nor `benchmarks`.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO


class _Guard:
    """Refuses to import the package that is judged."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in ("compress", "benchmarks"):
            raise ImportError("this process must not import compress")


def admit_torchvision() -> None:
    """Make torchvision importable where its wheel was built for CUDA and torch was not; timm needs its transforms alone.

    Without its library of operators, torchvision stops at those that it describes to PyTorch. They are declared here.
    """
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or "torchvision" in sys.modules:
        return
    try:
        for library in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(str(library))
    except OSError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def first_tensor(output: Any) -> Any:
    """The logits of a model's output, else its first tensor."""
    import torch

    if isinstance(output, torch.Tensor):
        return output
    if isinstance(getattr(output, "logits", None), torch.Tensor):
        return output.logits
    values = output.values() if hasattr(output, "values") else output
    return next((t for t in map(first_tensor, values) if t is not None), None) if values is not None else None


def computed(model: Any, inputs: dict[str, Any]) -> Any:
    """Outputs of a model, float32, with one seed for those that draw random numbers."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        return first_tensor(model(**inputs)).float()


def load(request: dict[str, Any]) -> tuple[Any, dict[str, list[str]]]:
    """The model of a folder, by its class or by the code in the folder; and the keys that do not fit."""
    import transformers

    config = json.loads((Path(request["folder"]) / "config.json").read_text(encoding="utf-8"))
    cls, options = getattr(transformers, request["class"], None), {}
    names = [name for name in config.get("auto_map", {}) if name not in ("AutoConfig", "AutoModel")]
    if "auto_map" in config:
        cls, options = getattr(transformers, (names or ["AutoModel"])[0]), {"trust_remote_code": True}
    elif config["architectures"][0] != request["class"]:
        cls = getattr(transformers, config["architectures"][0])
    model, info = cls.from_pretrained(request["folder"], output_loading_info=True, **options)
    return model.eval(), {key: sorted(map(str, value)) for key, value in info.items() if value}


def outputs(request: dict[str, Any]) -> dict[str, Any]:
    """Load a checkpoint, compute and save its outputs."""
    import torch

    model, info = load(request)
    inputs = torch.load(request["inputs"])
    values = computed(model, inputs)
    torch.save(values, request["outputs"])
    if request.get("twice"):
        return {"keys": info, "random": not torch.allclose(values, computed(model, inputs), atol=1e-5, equal_nan=True)}
    return {"keys": info}


def perplexity(request: dict[str, Any]) -> dict[str, Any]:
    """Perplexity of the documents of a causal language model, each in one window of its own."""
    import torch
    import transformers

    model, info = load(request)
    tokenizer = transformers.AutoTokenizer.from_pretrained(request["folder"])
    total, count = 0.0, 0
    for document in Path(request["text"]).read_text(encoding="utf-8").split("\n<|doc|>\n"):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(document)["input_ids"]]])
        with torch.no_grad():
            scores = first_tensor(model(input_ids=ids[:, :-1])).float()[0]  # the last token is only a target
        total += float(torch.nn.functional.cross_entropy(scores, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return {"keys": info, "nats": total, "tokens": count}


def serve(requests: Iterable[str], answers: TextIO) -> None:
    """Answer requests, one a line, until they end."""
    sys.meta_path.insert(0, _Guard())
    import torch
    import transformers

    admit_torchvision()
    gc.freeze()  # what is imported is not looked at again
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for line in requests:
        request = json.loads(line)
        try:
            answer = {"outputs": outputs, "perplexity": perplexity}[request["task"]](request)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(str(error).split())[:300]
            answer = {"error": f"{type(error).__name__}: {text}", "at": f"{where.filename}:{where.lineno}"}
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    """Serve the standard streams; nothing else is printed to them."""
    answers = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
