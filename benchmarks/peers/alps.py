"""ALPS as published: the class of alps.py of mazumder-lab/ALPS, block by block, each on what the pruned ones before it give.

The class wants a GPU; its `cuda:0` is read as `cpu`. It gets what its own llama.py would give it. The largest k of all entries
of a matrix are chosen by numpy's partition: the same ones as by `torch.topk` up to ties, in a twentieth of the time.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers import worker

#: What the published file says ▶ what runs here.
GPU = {
    "cuda:0": "cpu",
    "torch.topk(": "topk(",
    "torch.cuda.synchronize()": "None",
    "torch.cuda.empty_cache()": "None",
}


class _Stop(Exception):
    pass


def compress(model: Any, ids: torch.Tensor, request: dict[str, Any]) -> None:
    """Prune all linear layers of the blocks."""
    solver = published(request["code"])
    n, _, m = request["amount"].partition(":")
    target = {"sp": 0.5, "nm_n": int(n), "nm_m": int(m)} if m else {"sp": float(n.rstrip("%")) / 100}
    base = model.base_model
    blocks = base.h if hasattr(base, "h") else base.layers
    with torch.no_grad():
        inputs = block_inputs(model, blocks[0], ids)
        for block in blocks:
            layers = [module for module in block.modules() if isinstance(module, torch.nn.Linear)]
            solvers = [solver(layer, nsamples=len(ids), seqlen=ids.shape[1]) for layer in layers]
            handles = [
                layer.register_forward_hook(lambda _, x, y, one=one: one.add_batch(x[0].data, y.data))
                for layer, one in zip(layers, solvers, strict=True)
            ]
            for args, rest in inputs:
                block(*args, **rest)
            for handle in handles:
                handle.remove()
            for one in solvers:
                one.ALPS_admm(rho=0.1, **target)
                one.free()
            for number, (args, rest) in enumerate(inputs):
                output = block(*args, **rest)
                output = output[0] if isinstance(output, tuple) else output
                inputs[number] = ((output, *args[1:]), rest)


def published(code: str) -> Any:
    """The class, on a CPU."""
    text = Path(code).read_text()
    for old, new in GPU.items():
        text = text.replace(old, new)
    module = types.ModuleType("published")
    module.__dict__["topk"] = topk
    exec(text, module.__dict__)
    return module.ALPS_prune


def topk(values: torch.Tensor, k: int, dim: int = -1) -> tuple[None, torch.Tensor]:
    """Positions of the largest k, in no order."""
    if values.ndim > 1:
        return None, torch.topk(values, k, dim=dim, sorted=False).indices
    return None, torch.from_numpy(np.argpartition(-values.numpy(), k - 1)[:k].copy())


def block_inputs(model: Any, block: Any, ids: torch.Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What the first block is called with for each sample: the hidden states, and the rest."""
    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def catch(module: Any, args: tuple[Any, ...], rest: dict[str, Any]) -> None:
        inputs.append((args, rest))
        raise _Stop

    handle = block.register_forward_pre_hook(catch, with_kwargs=True)
    for row in ids:
        try:
            model(row[None], use_cache=False)
        except _Stop:
            continue
    handle.remove()
    return inputs


if __name__ == "__main__":
    worker.run(compress)
