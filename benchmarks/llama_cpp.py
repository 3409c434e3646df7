"""Quality of GGUF files in llama.cpp: `make bench-gguf [MODEL= TRAIN= HELDOUT=]`, and speed with `--speed`.

Ours and llama.cpp's own quantisation of the same dense file, each scored by llama.cpp on the same held-out windows beside
the dense model in transformers. Both have the same calibration: an importance matrix is the mean square of each input.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import page, scoring  # noqa: E402
from tools.runtimes import llama_cpp  # noqa: E402

#: llama.cpp's own quantisation of the dense file, with the importance matrix.
THEIRS = ("Q4_0", "Q4_K_S", "Q4_K_M", "Q5_K_S", "IQ4_XS")
INT4: dict[str, Any] = {"weights": "int4", "group_size": 32}
#: Settings of `cast`, then of the export.
OURS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "cast int4, group_size 32 ▶ Q4_0": (INT4, {"embeddings": "Q6_K"}),
    "the same, effort best ▶ Q4_0": ({**INT4, "effort": "best"}, {"embeddings": "Q6_K"}),
    "export --type Q4_K --imatrix": (None, {"type": "Q4_K", "embeddings": "Q6_K"}),
    "export --type Q4_K_M --imatrix": (None, {"type": "Q4_K_M"}),
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "examples/tiny-lm"))
    parser.add_argument("--train", nargs="+", default=[str(ROOT / "examples/text/train.txt")])
    parser.add_argument("--heldout", nargs="+", default=[str(ROOT / "examples/text/test.txt")])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--theirs", nargs="*", default=list(THEIRS))
    parser.add_argument("--ours", nargs="*", type=int, default=list(range(len(OURS))), help="numbers of our jobs")
    parser.add_argument("--speed", type=int, default=0, help="decode so many tokens with each file, too")
    parser.add_argument("--section", default="gguf", help="of docs/benchmarks.md; '-' prints only")
    args = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="compress-bench-"))
    try:
        rows = list(measured(args, place))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    speed = ["tokens per second"] if args.speed else []
    table = [
        f"## GGUF of {page.model_name(args.model)} in llama.cpp",
        "",
        f"`{page.command('bench-gguf', parser, args)}`: {page.environment()} llama.cpp of node-llama-cpp "
        f"{llama_cpp.VERSION}; {args.samples} × {scoring.WINDOW} calibration tokens for both, {args.windows} windows of "
        f"{scoring.WINDOW} tokens of {Path(args.heldout[0]).name}. KL from the dense model in transformers, nats per token, "
        "with its standard error over tokens. Embeddings are Q6_K in all, as in llama.cpp's own files.",
        "",
        *page.table(["file", "KL", "top-1", "bytes", *speed], rows),
    ]
    page.deliver(args.section, table)


def measured(args: argparse.Namespace, place: Path) -> Any:
    """A row for each file."""
    import compress

    windows, _ = scoring.token_windows(args.model, args.heldout[0], args.windows)
    theirs, importance = reference(args.model, windows, args.train[0], args.samples, place)
    compress.export(args.model, place / "dense.gguf", to="gguf")
    yield row("dense", place / "dense.gguf", windows, theirs, args.speed)
    for kind in args.theirs:
        llama_cpp.quantize(place / "dense.gguf", place / f"{kind}.gguf", kind, importance)
        yield row(f"llama.cpp {kind}, imatrix", place / f"{kind}.gguf", windows, theirs, args.speed)
    for number in args.ours:
        name, (cast, settings) = list(OURS.items())[number]
        source: Any = args.model
        if cast is not None:
            source = place / f"cast-{number}"
            compact = {"store": "compact"} if "gpt2" in (Path(args.model) / "config.json").read_text() else {}
            compress.apply(
                "cast", args.model, source, **cast, **compact, **scoring.calibration(args.train[0], args.samples)
            )
        else:
            settings = {**settings, "imatrix": str(place / "imatrix.gguf")}
        compress.export(source, place / f"ours-{number}.gguf", to="gguf", **settings)
        yield row(f"compress {name}", place / f"ours-{number}.gguf", windows, theirs, args.speed)


def reference(model: str, windows: Any, train: str, samples: int, place: Path) -> tuple[Any, dict[str, Any]]:
    """Log-probabilities of the dense model, and the importance matrix by name in GGUF, also written to a file."""
    import torch

    from compress.architectures.gguf import gguf_layout
    from compress.checkpoint.open import open_checkpoint
    from compress.exports.gguf.imatrix import Importance, imatrix_bytes, read_imatrix
    from compress.models.loading import load_model

    spec = open_checkpoint(model).spec
    layout = gguf_layout(spec.structure.config, {t.name: t.shape for t in spec.stored()})
    dense = load_model(model, dtype="float32")
    with torch.inference_mode():
        logits = torch.cat([dense(batch).logits for batch in windows.split(scoring.BATCH)]).double()
    sums: dict[str, Any] = {}
    hooks = []
    for name, module in dense.named_modules():
        weight = f"{name}.weight"
        if weight in layout.tensors and layout.tensors[weight].name.startswith("blk.") and module.weight.ndim == 2:

            def add(_: Any, inputs: Any, key: str = layout.tensors[weight].name) -> None:
                x = inputs[0].flatten(0, -2).double()
                total, count = sums.get(key, (0, 0))
                sums[key] = total + x.square().sum(0), count + len(x)

            hooks.append(module.register_forward_pre_hook(add))
    ids = scoring.calibration_samples(model, train, samples).ids
    with torch.inference_mode():
        for batch in ids.split(scoring.BATCH):
            dense(batch)
    for hook in hooks:
        hook.remove()
    entries = {k: Importance(total[None].numpy(), np.array([count])) for k, (total, count) in sums.items()}
    (place / "imatrix.gguf").write_bytes(imatrix_bytes(entries, [Path(train).name], scoring.WINDOW))
    return logits.log_softmax(-1).numpy(), read_imatrix(place / "imatrix.gguf")


def row(name: str, file: Path, windows: Any, theirs: Any, speed: int) -> list[str]:
    """Name, divergence with its standard error, agreement, bytes and speed of a file; printed, too."""
    import torch

    with llama_cpp.Model(file, length=scoring.WINDOW) as model:
        mine = torch.from_numpy(model.logits(windows.numpy())).double().log_softmax(-1).numpy()
        decoded = [f"{1 / model.seconds(16, speed)[1]:.1f}"] if speed else []
    divergence = (np.exp(theirs) * (theirs - mine)).sum(-1)
    error = divergence.std() / divergence.size**0.5
    same = (theirs.argmax(-1) == mine.argmax(-1)).mean()
    cells = [name, f"{divergence.mean():.5f} ± {error:.5f}", f"{same:.4f}", f"{file.stat().st_size:,}", *decoded]
    print(" | ".join(cells), flush=True)
    return cells


if __name__ == "__main__":
    main()
