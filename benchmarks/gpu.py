"""Time and memory on a GPU at the shape of an 8B Llama: `python3 benchmarks/gpu.py` (`make bench-gpu`).

It needs no make, no pip and no network: the machine's own torch, random weights that are made on the device, the shipped
text. A package that is missing is named, and what needs it is skipped. Each part runs in a process of its own, the most
important first, and prints one line of JSON; all take at most 8 minutes. --part chooses. Four blocks are timed, and the time
of 32 is extrapolated: 32 times the median block, and the rest once. A part that fails or takes too long says so in its line,
with the blocks that it finished. Without a GPU a small shape runs the same code.

Parts:
    gptq: int4 by GPTQ alone, goal 300 s and 6 GB for 8B. int4: the default, goal 900 s. distill: tokens a second and MFU by
    counted operations in bf16, goal 40 %. alps: 50 % sparsity. structured: a quarter of the MLP. tests: those marked `cuda`.
    peer: llm-compressor's GPTQ on the same blocks.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

NEEDED = ("torch", "transformers", "safetensors", "tokenizers", "pydantic")
#: Llama 3 8B, and a shape that a CPU does in seconds.
LARGE = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 8192,
}  # fmt: skip
SMALL = {
    "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
}  # fmt: skip
#: Blocks that are made, and those of the model that is asked about.
BLOCKS, ALL = 4, 32
#: Samples and tokens of the calibration, and steps of distillation, by shape.
CALIBRATION = {"large": (128, 2048), "small": (8, 128)}
#: Dense bf16 operations a second by the maker's data sheet, by a part of the device's name.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12, "B200": 2250e12}
GOALS = {"gptq": {"seconds_8b": 300, "peak_gb": 6}, "int4": {"seconds_8b": 900}, "distill": {"mfu": 0.4}}
#: Seconds after which a part is stopped, 60 where none are named; those of all together.
PATIENCE, TOTAL = {"gptq": 130, "int4": 160, "distill": 90, "alps": 90, "peer": 120}, 480


def shape(device: str) -> tuple[str, dict[str, int]]:
    """Name and sizes of the shape that the device does."""
    return ("large", LARGE) if device.startswith("cuda") else ("small", SMALL)


def make(folder: Path, device: str) -> None:
    """A checkpoint of random weights, made on the device, bf16, a shard for each block."""
    import torch
    import transformers
    from safetensors.torch import save_file

    config = transformers.LlamaConfig(
        **shape(device)[1], num_hidden_layers=BLOCKS, dtype="bfloat16", architectures=["LlamaForCausalLM"],
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        names = {name: value.shape for name, value in transformers.LlamaForCausalLM(config).state_dict().items()}
    generator = torch.Generator(device).manual_seed(0)
    index: dict[str, str] = {}
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, size in names.items():
        parts = name.split(".")
        shard = f"model-{parts[2] if 'layers' in parts else 'rest'}.safetensors"
        value = torch.ones(size, device=device)
        if len(size) == 2:  # the last columns are larger, as some of trained models are
            value.normal_(0, 0.02, generator=generator)
        shards.setdefault(shard, {})[name] = value.bfloat16().cpu()
        index[name] = shard
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def token_ids(samples: int, length: int, vocabulary: int) -> Any:
    """Ids of the shipped text by the shipped tokenizer, spread over the vocabulary, int64 [samples, length]."""
    import torch
    from tokenizers import Tokenizer

    text = (ROOT / "examples" / "text" / "train.txt").read_text(encoding="utf-8")
    ids = torch.tensor(Tokenizer.from_file(str(ROOT / "examples" / "tiny-lm" / "tokenizer.json")).encode(text).ids)
    ids = ids.repeat(-(-samples * length // len(ids)))[: samples * length]
    return (ids * (vocabulary // 2048)).reshape(samples, length)


class Finished:
    """Progress that prints a line of JSON for each finished block: what is known of a part that is stopped."""

    def __init__(self, title: str = "") -> None:
        self.title, self.start = title, time.perf_counter()

    def stage(self, index: int, total: int, title: str) -> None:
        """Nothing."""

    def task(self, title: str, total: int | None = None, unit: str = "tensors") -> Finished:
        """A task that prints a line for each block."""
        return Finished(title)

    def message(self, text: str) -> None:
        """Nothing."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Print the seconds since the last step where it was a block."""
        now = time.perf_counter()
        if note.startswith("block "):
            print(json.dumps({"done": f"{self.title}, {note}", "seconds": round(now - self.start, 2)}), flush=True)
        self.start = now

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None


def measured(device: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``work`` returns, with its seconds and the most bytes of the device's memory."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    facts = work()
    facts["seconds"] = round(time.perf_counter() - start, 2)
    if device.startswith("cuda"):
        facts["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return facts


def applied(name: str, settings: dict[str, Any], folder: Path, device: str) -> dict[str, Any]:
    """A calibrated pass; seconds of each block and of the whole model of 32."""
    import compress

    samples, length = CALIBRATION[shape(device)[0]]
    ids = token_ids(samples, length, shape(device)[1]["vocab_size"])
    details: dict[str, Any] = {}

    def work() -> dict[str, Any]:
        out = folder.parent / "out"
        compress.apply(name, folder, out, data=ids, device=device, details=details, progress=Finished(), **settings)
        return {"samples": samples, "length": length}

    facts = measured(device, work)
    blocks = [block["seconds"] for block in details["blocks"]]
    rest = facts["seconds"] - sum(blocks)
    facts["block_seconds"] = [round(seconds, 2) for seconds in blocks]
    facts["seconds_8b"] = round(ALL * statistics.median(blocks) + rest, 1)
    return facts


def gptq(folder: Path, device: str) -> dict[str, Any]:
    """Int4 by GPTQ alone."""
    settings = {"weights": "int4", "error_correction": [], "reconstruction_epochs": 0}
    return applied("cast", settings, folder, device)


def int4(folder: Path, device: str) -> dict[str, Any]:
    """Int4 by the defaults."""
    return applied("cast", {"weights": "int4"}, folder, device)


def alps(folder: Path, device: str) -> dict[str, Any]:
    """Half of the weights by ALPS, without tuning."""
    settings = {"method": "alps", "sparsity": 0.5, "reconstruction_epochs": 0}
    return applied("prune_unstructured", settings, folder, device)


def structured(folder: Path, device: str) -> dict[str, Any]:
    """A quarter of the MLP by the defaults."""
    return applied("prune_structured", {"mlp": 0.25}, folder, device)


def distill(folder: Path, device: str) -> dict[str, Any]:
    """Distillation of four blocks of 8B's width with the vocabulary, from a teacher of the same shape.

    Operations: 6 for each parameter and token of the student, 2 of the teacher, embeddings left out, and those of attention.
    """
    import torch

    import compress

    name, sizes = shape(device)
    batch, length, steps = (8, 1024, 12) if name == "large" else (4, 128, 4)
    ids = token_ids(batch * steps, length, sizes["vocab_size"])
    details: dict[str, Any] = {}
    dtype = "bfloat16" if device.startswith("cuda") else "float32"

    def work() -> dict[str, Any]:
        compress.apply(
            "distill", folder, folder.parent / "student", data=ids, device=device, dtype=dtype, details=details,
            teacher=[{"checkpoint": str(folder)}], steps=steps, batch_size=batch, validation_samples=batch, allow_noop=True,
        )  # fmt: skip
        return {"batch": batch, "length": length, "steps": steps}

    facts = measured(device, work)
    width, inner, heads = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_attention_heads"]
    kv = sizes["num_key_value_heads"] * sizes["head_dim"]
    weights = BLOCKS * (2 * width * heads * sizes["head_dim"] + 2 * width * kv + 3 * width * inner)
    weights += width * sizes["vocab_size"]
    attention = BLOCKS * 2 * length * heads * sizes["head_dim"]  # products of a token with the half that it sees
    operations = (6 + 2) * weights + 4 * attention
    speed = details["training"]["tokens_per_second"]
    facts |= {"tokens_per_second": speed, "tflops": round(speed * operations / 1e12, 2)}
    if device.startswith("cuda"):
        card = torch.cuda.get_device_name()
        if peak := next((value for part, value in PEAKS.items() if part in card), None):
            facts["mfu"] = round(speed * operations / peak, 3)
    return facts


def tests(folder: Path, device: str) -> dict[str, Any]:
    """The tests marked `cuda`."""
    if importlib.util.find_spec("pytest") is None:
        return {"skipped": "pytest is not installed"}
    if not device.startswith("cuda"):
        return {"skipped": "there is no GPU"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "--no-header", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return {"status": done.returncode, "last": done.stdout.strip().splitlines()[-8:]}


def peer(folder: Path, device: str) -> dict[str, Any]:
    """llm-compressor's GPTQ on the same blocks and ids."""
    if importlib.util.find_spec("llmcompressor") is None:
        return {"skipped": "llmcompressor is not installed"}
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    samples, length = CALIBRATION[shape(device)[0]]
    ids = token_ids(samples, length, shape(device)[1]["vocab_size"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(num_bits=4, strategy="group", group_size=64)
    )
    modifier = GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"])

    def work() -> dict[str, Any]:
        oneshot(model=model, dataset=data, recipe=modifier, num_calibration_samples=samples, max_seq_length=length)
        return {"samples": samples, "length": length}

    facts = measured(device, work)
    return {**facts, "seconds_8b": round(facts["seconds"] * ALL / BLOCKS, 1)}


PARTS = {part.__name__: part for part in (gptq, int4, distill, alps, structured, tests, peer)}


def reached(part: str, facts: dict[str, Any]) -> dict[str, bool]:
    """Which goals a part reaches; those of figures that it has."""
    goals = GOALS.get(part, {})
    return {
        key: (facts[key] >= goal if key == "mfu" else facts[key] <= goal) for key, goal in goals.items() if key in facts
    }


def one(part: str, folder: Path, device: str) -> None:
    """Run one part in this process, and print its line."""
    import torch

    facts = PARTS[part](folder, device)
    where = torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
    line = {"part": part, "device": where, "shape": shape(device)[0], **facts}
    if device.startswith("cuda"):
        line["goals"] = reached(part, facts)
    print(json.dumps(line), flush=True)


def main() -> int:
    """Run the parts; 1 where one failed."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--device", help="cuda where there is one, else cpu")
    options.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = options.parse_args()
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(json.dumps({"skipped": f"not installed: {', '.join(missing)}"}))
        return 1
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.inside:
        one(args.part[0], args.inside, device)
        return 0
    start, status = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="gpu-") as place:
        folder = Path(place) / "model"
        make(folder, device)
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
        print(
            json.dumps({"part": "model", "seconds": round(time.monotonic() - start, 1), "torch": torch.__version__}),
            flush=True,
        )
        for part in args.part:
            left = min(PATIENCE.get(part, 60), TOTAL - (time.monotonic() - start))
            if left < 10:
                print(json.dumps({"part": part, "skipped": "no time is left"}), flush=True)
                continue
            status |= _run(part, folder, device, left)
    return status


def _run(part: str, folder: Path, device: str, seconds: float) -> int:
    """Run a part in a process of its own; 1 where it failed."""
    with tempfile.TemporaryDirectory(prefix="gpu-") as place:
        own = Path(place) / "model"
        own.symlink_to(folder, target_is_directory=True)
        command = [sys.executable, __file__, "--part", part, "--device", device, "--inside", str(own)]
        try:
            done = subprocess.run(command, cwd=ROOT, timeout=seconds, capture_output=True, text=True, check=False)
        except subprocess.TimeoutExpired as stopped:
            return _failed(part, f"took more than {seconds:.0f} seconds", stopped.stdout or b"")
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return _failed(part, last_error(done.stderr) or f"status {done.returncode}", done.stdout)
    print(lines[-1], flush=True)
    return 0


def last_error(text: str) -> str:
    """The last line of an error, and the innermost line of code of this repository."""
    lines = text.strip().splitlines()
    places = [line.strip() for line in lines if line.startswith('  File "' + str(ROOT))]
    return "; ".join([lines[-1][:400], *places[-1:]]) if lines else ""


def _failed(part: str, why: str, output: str | bytes) -> int:
    """Print the line of a part without a result, with the steps that it finished."""
    text = output.decode(errors="replace") if isinstance(output, bytes) else output
    done = [json.loads(line) for line in text.splitlines() if line.startswith('{"done"') and line.endswith("}")]
    print(json.dumps({"part": part, "failed": why, "done": done}), flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
