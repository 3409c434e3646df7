"""Helpers that several files of tests use: passes applied, checkpoints damaged, models compared.

Fixtures are in `tests.conftest`, pico models in `tests.pico`, processes in `tests.processes`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from compress import architectures, passes
from compress.architectures.model_map import model_map
from compress.blockwise.inputs import Inputs
from compress.blockwise.runner import BlockRunner
from compress.checkpoint.open import Stored, open_checkpoint
from compress.checkpoint.values import Checkpoint
from compress.checkpoint.write import write_checkpoint
from compress.models.blocks import find_blocks
from compress.models.loading import load_model
from compress.passes.base import Context
from compress.progress import SilentProgress
from compress.workspace import Workspace
from tests import pico, processes


def apply(
    checkpoint: Checkpoint,
    name: str,
    *,
    data: Any = None,
    work: Path = Path("/nowhere"),
    details: dict[str, Any] | None = None,
    **settings: Any,
) -> Checkpoint:
    """The lazily changed checkpoint."""
    instance = passes.get(name)
    context = Context(
        checkpoint,
        "cpu",
        "float32",
        0,
        None,
        lambda key: data,
        SilentProgress(),
        Workspace(work),
        details={} if details is None else details,
    )
    return instance.apply(checkpoint, instance.settings(**settings), context)


def plan(checkpoint: Checkpoint, name: str, **settings: Any) -> Any:
    """The planned spec."""
    instance = passes.get(name)
    return instance.plan(checkpoint.spec, instance.settings(**settings))


def write(checkpoint: Checkpoint, folder: Path, **kwargs: Any) -> Stored:
    """Written and opened again."""
    return open_checkpoint(write_checkpoint(checkpoint, folder, **kwargs).folder)


def divergence(original: Any, changed: Any, ids: torch.Tensor) -> float:
    """Mean KL of a model's predictions from those of the original, of checkpoints or models."""
    models = [load_model(m) if isinstance(m, Path) else m for m in (original, changed)]
    with torch.no_grad():
        x, y = (m(input_ids=ids)[0].log_softmax(-1) for m in models)
    return float(torch.nn.functional.kl_div(y, x, log_target=True, reduction="sum")) / ids.numel()


def bypass(model: Any, numbers: Iterable[int]) -> None:
    """Blocks hand on what they read; where a block returns a tuple, it still does."""
    blocks = find_blocks(model, architectures.of(model.config.to_dict()))
    for number in numbers:

        def forward(hidden_states: Any, *args: Any, real: Any = blocks[number].forward, **kwargs: Any) -> Any:
            output = real(hidden_states, *args, **kwargs)
            return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states

        blocks[number].forward = forward


class Folders(Mapping[str, Path]):
    """Family ▶ a pico checkpoint without tokenizer, read only; besides the families, ``bf16`` is a Llama in bfloat16."""

    def __getitem__(self, name: str) -> Path:
        family, dtype = ("llama", torch.bfloat16) if name == "bf16" else (name, torch.float32)
        return pico.folder(family, with_tokenizer=False, dtype=dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(pico.FAMILIES)

    def __len__(self) -> int:
        return len(pico.FAMILIES)


def prune(checkpoint: Checkpoint, **settings: Any) -> Checkpoint:
    """Pruned by magnitude."""
    return apply(checkpoint, "prune_unstructured", method="magnitude", **settings)


def edit_config(folder: Path, **changes: object) -> None:
    """Change fields of a checkpoint's config; ``...`` takes one away."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def raw(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with that header, JSON or bytes, before that data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    """A tensor in a header of safetensors."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


#: Fixed token ids, [1, 20].
IDS = torch.arange(20)[None] + 5
_STOCK = """
import sys, torch, transformers
folder, out, trust = sys.argv[1:]
extra = {"trust_remote_code": True} if trust == "1" else {}
model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True, **extra)
assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
assert not any(m == "compress" or m.startswith("compress.") for m in sys.modules)
with torch.no_grad():
    torch.save(model(torch.arange(20)[None] + 5).logits.float(), out)
"""


def stock_logits(folder: Path, tmp_path: Path, *, trust: bool = False) -> torch.Tensor:
    """Logits after `IDS` by transformers alone, in a process that cannot import this package."""
    out = tmp_path / "logits.pt"
    done = processes.run(_STOCK, folder, out, int(trust), foreign=True)
    assert done.returncode == 0, done.stderr[-2000:]
    logits: torch.Tensor = torch.load(out)
    return logits


def our_logits(folder: Path, dtype: str | None = None) -> torch.Tensor:
    """Logits after `IDS` by this package, float32."""
    with torch.no_grad():
        logits: torch.Tensor = load_model(folder, dtype=dtype)(input_ids=IDS).logits
    return logits.float()


def output_error(folder: Path, other: Path, ids: torch.Tensor) -> float:
    """Mean squared difference of the outputs of two models."""
    models = [load_model(f, dtype="float32") for f in (folder, other)]
    with torch.no_grad():
        first, second = (m(input_ids=ids)[0] for m in models)
    return float((first - second).square().mean())


def gram(seed: int, tokens: int, inputs: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """X^T X of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    X = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mixing
    return (X.T @ X).to(dtype)


def flip(path: Path) -> bytes:
    """Change the last byte in place: the same inode and size. Returns what is there now."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    return bytes(data)


def fork(work: Callable[[], object]) -> int:
    """Run ``work`` in a copy of this process; its exit status."""
    process = os.fork()
    if process == 0:
        status = 70
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def tree(folder: Path) -> dict[str, tuple[object, ...]]:
    """Everything below a folder: kind, contents, time of change."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        body = path.read_bytes() if path.is_file() and not path.is_symlink() else None
        found[str(path.relative_to(folder))] = (info.st_ino, info.st_mtime_ns, info.st_mode, body)
    return found


def data_file(folder: Path) -> Path:
    """The tensors of a state of training."""
    return next(folder.glob("*.distcp"))


#: Samples and tokens of `inputs_of`.
SAMPLES, LENGTH = 6, 12


def inputs_of(checkpoint: Checkpoint, samples: int = SAMPLES, mask: torch.Tensor | None = None) -> Inputs:
    """Random inputs for a run over the blocks: token ids [samples, LENGTH], or images."""
    generator = torch.Generator().manual_seed(0)
    if checkpoint.spec.structure.model_type == "vit":
        size = checkpoint.spec.structure.config["image_size"]
        return Inputs({"pixel_values": torch.randn(samples, 3, size, size, generator=generator)})
    return Inputs({"input_ids": torch.randint(2, 250, (samples, LENGTH), generator=generator)}, mask)


#: The linear layers of a Llama's block that read the same inputs, in the order of reading.
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def matrices(checkpoint: Checkpoint) -> set[str]:
    """Names of the matrices of blocks."""
    layers = model_map(checkpoint.spec).layers
    return {x.name for x in layers if len(x.tensor.shape) == 2 and x.block is not None}


def runner_of(
    checkpoint: Checkpoint,
    work: Path,
    inputs: Inputs | None = None,
    wanted: set[str] | None = None,
    with_targets: bool = False,
    device: str = "cpu",
) -> BlockRunner:
    """A runner over the blocks in float32, whose state lies in ``work``."""
    return BlockRunner(
        checkpoint,
        inputs or inputs_of(checkpoint),
        wanted or matrices(checkpoint),
        workspace=Workspace(work),
        dtype="float32",
        device=device,
        progress=SilentProgress(),
        with_targets=with_targets,
    )
