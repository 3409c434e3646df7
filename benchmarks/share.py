"""Held-out loss after sharing and low-rank factors.

`make bench-share [MODEL= TRAIN= HELDOUT=]`, sections of docs/benchmarks.md.

Half of the blocks' parameters go: blocks are dropped, or share in pairs, as the pass does it and by the plain mean, with and
without residuals; each is then distilled under the original with the same tokens, samples and settings. And weight matrices
become factors of 60 % of their parameters: by the singular values of the weights, as ASVD (arXiv 2312.05821) and SVD-LLM (arXiv
2403.07378) have it, after their published formulas, and by the pass; beside structured pruning of as many bytes. Scores are
those of benchmarks/scoring.py.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import page, scoring  # noqa: E402

SHARE: dict[str, tuple[str, dict[str, Any]]] = {
    "half of the blocks dropped": ("prune_structured", {"layers": 0.5}),
    "pairs, plain mean of neighbours": (
        "share",
        {"arrangement": "sequence", "init": "mean", "align": False, "residual_rank": 0},
    ),
    "pairs, units in one order, not solved": ("share", {"arrangement": "sequence", "init": "mean", "residual_rank": 0}),
    "pairs, no residuals": ("share", {"residual_rank": 0}),
    "pairs (default: residuals of rank 8)": ("share", {}),
}
DISTILLED = ["half of the blocks dropped", "pairs, no residuals", "pairs (default: residuals of rank 8)"]
KEEP = 0.6


def size(folder: Path) -> int:
    """Bytes of the weight files."""
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def resident(folder: Path) -> int:
    """Bytes of the parameters of the loaded model, shared ones once."""
    import compress

    return sum(p.numel() * p.element_size() for p in compress.load(folder).parameters())


def sharing(args: argparse.Namespace, scratch: Path) -> list[str]:
    """Held-out loss, bytes in the file and in memory of each way, before and after distillation."""
    import compress
    from compress import architectures
    from compress.checkpoint.open import open_headers

    texts = scoring.held_out(args)
    config = open_headers(args.model)[0].structure.config
    depth = architectures.of(config).depth(config)
    data = scoring.calibration(args.calibration or args.train[0], args.samples)
    before, held = size(Path(args.model)), resident(Path(args.model))
    rows = []
    for way in args.ways:
        name, settings = SHARE[way]
        folder = scratch / way.replace(" ", "-")
        if not folder.exists():
            more = {"groups": depth // 2} if name == "share" else {}
            compress.apply(name, args.model, folder, store="compact", **more, **settings, **data)
        row = [way, f"{size(folder) / before:.3f} ×", f"{resident(folder) / held:.3f} ×"]
        row += [*texts.cells([texts.score(folder)]), ""]
        if args.tokens and way in DISTILLED:
            trained, begun = scratch / f"{folder.name}-distilled", time.perf_counter()
            if not trained.exists():
                compress.apply(
                    "distill", folder, trained, data=args.train, document_separator="<|doc|>", teacher=args.model,
                    tokens=args.tokens, autocast=args.autocast, store="compact",
                )  # fmt: skip
            rows.append(row)
            seconds = f"{time.perf_counter() - begun:.0f}"
            row = ["… distilled", *row[1:3], *texts.cells([texts.score(trained)]), seconds]
        rows.append(row)
        print(*rows[-1], flush=True)
    cast = " but autocast" * bool(args.autocast)
    return [
        f"{Path(args.model).name}, {depth} blocks; then {args.tokens:,} tokens of "
        f"{', '.join(Path(f).name for f in args.train)}, with the defaults of `distill`{cast}. {texts.note()}",
        "",
        *page.table(["", "file", "parameters in memory", *scoring.COLUMNS, "seconds of distilling"], rows),
    ]


def factors(args: argparse.Namespace, scratch: Path) -> list[str]:
    """Error of the outputs and held-out loss with factors of 60 % of the parameters, each way."""
    import torch

    import compress
    from compress.architectures.model_map import model_map
    from compress.blockwise.executor import BlockExecutor
    from compress.blockwise.inputs import Inputs
    from compress.blockwise.saved_hessians import SavedHessians
    from compress.checkpoint.open import open_checkpoint
    from compress.checkpoint.values import Derived, Value
    from compress.checkpoint.write import write_checkpoint
    from compress.progress import SilentProgress
    from compress.solvers.low_rank import low_rank
    from compress.workspace import Workspace

    texts = scoring.held_out(args)
    checkpoint = open_checkpoint(args.model)
    data = scoring.calibration(args.calibration or args.train[0], args.samples)
    ids = data["data"]
    if not isinstance(ids, torch.Tensor):
        ids = scoring.token_windows(args.model, args.train[0], args.samples)[0]
    rows: list[list[str]] = []
    targets = model_map(checkpoint.spec).targets
    names = [linear.name for linear in targets]
    by_block: dict[int, list[str]] = {}
    for linear in targets:
        by_block.setdefault(linear.block or 0, []).append(linear.name)
    executor = BlockExecutor(checkpoint, Inputs({"input_ids": ids}), dtype="float32", device="cpu")
    read = SavedHessians(Workspace(scratch / "read"), "cpu")
    read.collect(
        executor,
        by_block,
        activations=scratch / "sweep",
        progress=SilentProgress(),
        title="collecting Hessians",
        check=True,
    )

    def svd(W: torch.Tensor, H: torch.Tensor, rank: int) -> torch.Tensor:
        U, S, V = torch.linalg.svd(W, full_matrices=False)
        return (U[:, :rank] * S[:rank]) @ V[:rank]

    def asvd(W: torch.Tensor, H: torch.Tensor, rank: int) -> torch.Tensor:
        scale = H.diagonal().clamp_min(1e-30).sqrt().sqrt()  # the paper's α of ½, of root mean squares
        return svd(W * scale, H, rank) / scale

    def svd_llm(W: torch.Tensor, H: torch.Tensor, rank: int) -> torch.Tensor:
        L = torch.linalg.cholesky(H + 1e-6 * H.diagonal().mean() * torch.eye(len(H)))
        return torch.linalg.solve_triangular(L, svd(W @ L, H, rank), upper=False, left=False)

    def ours(W: torch.Tensor, H: torch.Tensor, rank: int) -> torch.Tensor:
        up, down, _, _ = low_rank(W, H, rank)
        return up @ down

    ways: dict[str, Callable[..., torch.Tensor]] = {
        "SVD of the weights": svd, "ASVD": asvd, "SVD-LLM": svd_llm, "the pass's solver alone": ours
    }  # fmt: skip
    for way, solve in ways.items():
        values, error = {}, 0.0
        for name in names:
            W, H = checkpoint.tensor(name).data.double(), read.hessian(name).double()
            V = solve(W, H, int(KEEP * W.numel() / sum(W.shape)))
            error += float((((W - V) @ H) * (W - V)).sum() / ((W @ H) * W).sum())
            values[name] = V.to(checkpoint.tensor(name).data.dtype)
        folder = scratch / way.replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        changed = {n: Value(v) for n, v in values.items()}
        write_checkpoint(
            Derived(checkpoint, checkpoint.spec, lambda n, c=changed: c.get(n) or checkpoint.tensor(n)), folder
        )
        rows.append([way, f"{100 * error / len(names):.2f} %", *texts.cells([texts.score(folder)]), "", ""])
        print(*rows[-1], flush=True)
    passes: dict[str, tuple[str, dict[str, Any]]] = {
        "factorize, uniform, not tuned": ("factorize", {"allocation": "uniform", "reconstruction_epochs": 0}),
        "factorize, not tuned": ("factorize", {"reconstruction_epochs": 0}),
        "factorize (default)": ("factorize", {}),
    }
    for way, (name, settings) in passes.items():
        folder, begun = scratch / way.replace(" ", "-"), time.perf_counter()
        if not folder.exists():
            compress.apply(name, args.model, folder, store="compact", keep_parameters=KEEP, **settings, **data)
        seconds = f"{time.perf_counter() - begun:.0f}"
        rows.append([way, "", *texts.cells([texts.score(folder)]), f"{size(folder):,}", seconds])
        print(*rows[-1], flush=True)
    target, begun = size(scratch / "factorize-(default)"), time.perf_counter()
    folder = scratch / "structured"
    if not folder.exists():
        compress.apply("prune_structured", args.model, folder, max_bytes=target, **data)
    seconds = f"{time.perf_counter() - begun:.0f}"
    cells = texts.cells([texts.score(folder)])
    rows.append(["prune_structured, as many bytes", "", *cells, f"{size(folder):,}", seconds])
    print(*rows[-1], flush=True)
    return [
        f"{Path(args.model).name}: every weight matrix of the blocks becomes two factors with {KEEP:.0%} of its parameters; "
        "in the pass, of all matrices together. Error: mean over matrices of ‖(W - W')X‖² / ‖WX‖², with X from the whole "
        f"model. {texts.note()}",
        "",
        *page.table(["", "error", *scoring.COLUMNS, "bytes", "seconds"], rows),
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "examples/tiny-lm"))
    parser.add_argument("--train", nargs="+", default=[str(ROOT / "examples/text/train.txt")])
    parser.add_argument("--calibration", help="token ids, file.safetensors:name; by default the training text")
    scoring.options(parser)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2_000_000, help="to distill with; 0 for none")
    parser.add_argument("--autocast", choices=["bfloat16"], help="of distillation")
    parser.add_argument("--ways", nargs="+", default=list(SHARE), choices=list(SHARE))
    parser.add_argument("--jobs", nargs="+", default=["share", "factorize"], choices=["share", "factorize"])
    parser.add_argument("--scratch", type=Path, help="keep checkpoints there, and take those that are there")
    parser.add_argument("--section", help="of docs/benchmarks.md, the job's name by default; '-' prints only")
    args = parser.parse_args()
    scratch = args.scratch or Path(tempfile.mkdtemp(prefix="compress-bench-"))
    scratch.mkdir(parents=True, exist_ok=True)
    titles = {"share": "Sharing blocks", "factorize": "Low-rank factors"}
    try:
        for job in args.jobs:
            found = sharing(args, scratch) if job == "share" else factors(args, scratch)
            head = [
                f"## {titles[job]} of {Path(args.model).name}"
                + (f", {args.tokens:,} tokens" if job == "share" else ""),
                "",
                f"`{page.command('bench-share', parser, args)}`: {page.environment()}",
                "",
            ]
            page.deliver(args.section or job, [*head, *found])
    finally:
        if not args.scratch:
            shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
