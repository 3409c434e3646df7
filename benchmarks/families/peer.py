"""The process that quantises pico models by llm-compressor's `oneshot` with GPTQ, in an environment of its own.

A script: reads requests, JSON, one a line, and answers each with a line. It must import neither `compress` nor `benchmarks`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO


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


def difference(a: Any, b: Any) -> float:
    """Largest difference, relative to the larger of 1 and the largest value of ``a``."""
    kept = (a.abs() < 1e30) & (b.abs() < 1e30)  # classes give larger values to tokens that they rule out
    a, b = a[kept], b[kept]
    return float((a - b).abs().max()) / max(1.0, float(a.abs().max())) if a.numel() else 0.0


def gptq(request: dict[str, Any]) -> dict[str, Any]:
    """Int4 weights with a scale for each channel; whether what is written loads with equal, and with other outputs."""
    import transformers

    cls = getattr(transformers, request["class"], None)
    if cls is None:
        return {"verdict": "absent", "reason": f"transformers {transformers.__version__} has no {request['class']}"}
    old = {"verdict": "absent", "reason": f"transformers {transformers.__version__} does not load the original"}
    try:
        if any(cls.from_pretrained(request["folder"], output_loading_info=True)[1].values()):
            return old
    except Exception:
        return old
    answer = {}
    for pipeline in ("independent", "basic"):  # its default, and the one that does not run layer by layer
        try:
            return quantised(cls, request, pipeline)
        except Exception as error:
            answer = answer or refusal(error)
    return answer


def quantised(cls: Any, request: dict[str, Any], pipeline: str) -> dict[str, Any]:
    """Quantise by one of its pipelines, write, load again."""
    import shutil

    import torch
    import transformers
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    model = cls.from_pretrained(request["folder"]).eval()
    samples = torch.load(request["samples"])
    before = computed(model, samples[0])
    args = QuantizationArgs(num_bits=4, symmetric=True, strategy="channel")
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    heads = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    ignore = [*heads, "re:.*head", "re:.*classifier.*", "re:.*score"]
    modifier = GPTQModifier(config_groups={"all": scheme}, ignore=ignore)
    loader = torch.utils.data.DataLoader(samples, batch_size=None)
    processor: Any = None  # it asks for one, though the inputs are made
    if (Path(request["folder"]) / "tokenizer.json").exists():
        processor = transformers.AutoTokenizer.from_pretrained(request["folder"])
    elif (Path(request["folder"]) / "preprocessor_config.json").exists():
        kind = transformers.AutoImageProcessor if "pixel_values" in samples[0] else transformers.AutoFeatureExtractor
        processor = kind.from_pretrained(request["folder"])
    oneshot(model=model, dataset=loader, recipe=modifier, pipeline=pipeline, processor=processor)
    after = computed(model, samples[0])
    shutil.rmtree(request["to"], ignore_errors=True)
    model.save_pretrained(request["to"], save_compressed=True)
    try:
        again, info = cls.from_pretrained(request["to"], output_loading_info=True)
        far = difference(after, computed(again.eval(), samples[0]))
    except Exception as error:
        return {**refusal(error), "verdict": "unread"}
    if difference(before, after) <= 1e-7:
        return {"verdict": "refused", "reason": "nothing has changed"}
    if not far <= 1e-3:
        missing = [name for names in info.values() for name in sorted(map(str, names))]
        keys = f"; {len(missing)} keys do not fit, such as {missing[0]}" if missing else ""
        return {"verdict": "unread", "reason": f"outputs differ from those of the stock reload by {far:.2g}{keys}"}
    return {"verdict": "works", "reason": "" if pipeline == "independent" else f"pipeline: {pipeline}"}


def refusal(error: Exception) -> dict[str, Any]:
    """The answer for an exception."""
    text = " ".join(str(error).split())[:300]
    at = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-1:]]
    verdict = "absent" if isinstance(error, ImportError) else "refused"  # the environment lacks a package
    return {"verdict": verdict, "reason": f"{type(error).__name__}: {text}", "at": at}


def serve(requests: Iterable[str], answers: TextIO) -> None:
    """Answer requests, one a line, until they end."""
    import torch
    import transformers

    gc.freeze()  # what is imported is not looked at again
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("llmcompressor", "transformers", "torch"))
    for line in requests:
        try:
            answer = gptq(json.loads(line))
        except Exception as error:
            answer = refusal(error)
        print(json.dumps({**answer, "versions": versions}), file=answers, flush=True)


def main() -> None:
    """Serve the standard streams; nothing else is printed to them."""
    answers = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
