"""Held-out loss after removing units by simple scores, without repair: `benchmarks/simple_scores.py [--model … --heldout …]`.

The peer of benchmarks/structured.py, without this package's passes. Neurons and groups of heads go by the activation score of
Minitron (arXiv 2407.14679): mean magnitude over the tokens of a sample, then the root of the sum of squares over samples, all
on the original model. Blocks go by block influence (ShortGPT, arXiv 2403.03853). What goes is set to zero, which computes the
same as a smaller model. The figures go to those of other tools on the model, which `make bench-structured` reads.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import page, scoring  # noqa: E402

#: Kind of unit, and the share or number that goes.
JOBS: dict[str, tuple[str, float]] = {
    "MLP 25%": ("mlp", 0.25),
    "MLP 50%": ("mlp", 0.5),
    "1 KV group": ("heads", 1),
    "1 block": ("layers", 1),
    "2 blocks": ("layers", 2),
    "3 blocks": ("layers", 3),
}


def blocks(model: Any) -> list[tuple[Any, Any, Any]]:
    """Each block, and the modules in it that read neurons and heads."""
    if hasattr(model, "transformer"):  # GPT-2
        return [(b, b.mlp.c_proj, b.attn.c_proj) for b in model.transformer.h]
    return [(b, b.mlp.down_proj, b.self_attn.o_proj) for b in model.model.layers]


def scores(model: Any, ids: torch.Tensor, groups: int) -> dict[str, list[Any]]:
    """Scores of each block's neurons and groups of heads, and its influence; one pass over the ids [samples, length]."""
    totals: dict[str, list[Any]] = {kind: [0.0 for _ in blocks(model)] for kind in ("mlp", "heads", "layers")}

    def neurons(index: int, x: torch.Tensor) -> None:
        totals["mlp"][index] += x.abs().mean(1).square().sum(0)

    def heads(index: int, x: torch.Tensor) -> None:
        norms = x.unflatten(-1, (model.config.num_attention_heads, -1)).norm(dim=-1)
        totals["heads"][index] += norms.unflatten(-1, (groups, -1)).sum(-1).mean(1).square().sum(0)

    def influence(index: int, before: torch.Tensor, after: torch.Tensor) -> None:
        totals["layers"][index] += float((1 - torch.nn.functional.cosine_similarity(before, after, dim=-1)).sum())

    for i, (block, down, output) in enumerate(blocks(model)):
        down.register_forward_pre_hook(lambda _, x, i=i: neurons(i, x[0]))
        output.register_forward_pre_hook(lambda _, x, i=i: heads(i, x[0]))
        block.register_forward_hook(lambda _, x, y, i=i: influence(i, x[0], y if isinstance(y, torch.Tensor) else y[0]))
    with torch.no_grad():
        for rows in ids.split(4):
            model.base_model(rows, use_cache=False)
    return totals


def remove(model: Any, kind: str, amount: float, found: dict[str, list[Any]]) -> None:
    """Set units of least score to zero in the modules that read them; of a block both its outputs."""
    if kind == "layers":
        for i in torch.tensor(found["layers"]).argsort()[: int(amount)].tolist():
            for module in blocks(model)[i][1:]:
                for parameter in module.parameters():
                    parameter.zero_()
        return
    for (_, down, output), score in zip(blocks(model), found[kind], strict=True):
        module = down if kind == "mlp" else output
        gone = score.argsort()[: round(amount * len(score)) if amount < 1 else int(amount)]
        weight = module.weight if hasattr(module, "nf") else module.weight.T  # GPT-2's Conv1D is [in, out]
        weight[torch.arange(len(weight)).view(len(score), -1)[gone].flatten()] = 0


def main() -> None:
    """Command line."""
    from compress.models.loading import load_model

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "examples/tiny-lm"))
    parser.add_argument("--train", default=str(ROOT / "examples/text/train.txt"), help="text, or ids.safetensors:name")
    scoring.options(parser)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=list(JOBS))
    args = parser.parse_args()
    texts = scoring.held_out(args)
    ids = scoring.calibration_samples(args.model, args.train, args.samples).ids
    model = load_model(args.model, dtype="float32")
    groups = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
    found = scores(model, ids, groups)
    for job in args.jobs:
        model = load_model(args.model, dtype="float32")
        with torch.no_grad():
            remove(model, *JOBS[job], found)
        draw = texts.score(model)
        row = {"tool": "simple score", "method": "no repair", "amount": job}
        page.keep_peer(args.model, row | {"rise": round(texts.rise(draw), 4), "kl": round(texts.kl(draw), 4)})
        print(job, *texts.cells([draw]), flush=True)


if __name__ == "__main__":
    main()
