"""Makes the committed compact checkpoints in ``tests/data/format1``: a few kB for each codec and each edit.

They hold the promise that format 1 still opens, so what is there is never made again. For a new codec or edit add a
function to `MAKERS` and run ``python -m tests.checkpoint.golden``: it makes what is missing.

Weights are multiples of 1/64 no larger than 1, so products of factors are exact before they are rounded, on every machine. The bundled modelling
file is left out: it is not what the format promises, and ten times as large as the rest.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from transformers import SqueezeBertConfig, SqueezeBertForMaskedLM

import compress
from compress.checkpoint import bundle
from compress.checkpoint.edits.base import alias
from compress.checkpoint.edits.factors import factored
from compress.checkpoint.edits.linformer import attentions, projected_attention
from compress.checkpoint.edits.local import localised
from compress.checkpoint.edits.projected import projected
from compress.checkpoint.edits.shared import shared
from compress.checkpoint.edits.sized import sized
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.values import Checkpoint, Codes, Derived, Value
from compress.checkpoint.write import write_checkpoint
from compress.solvers.quant_format import Scales, dequantize, rounded, to_codes
from compress.solvers.trellis import trellis_nearest
from compress.spec.formats import QuantFormat
from compress.spec.spec import FLOAT_DTYPES, Spec
from tests import pico

FOLDER = Path(__file__).resolve().parent.parent / "data/format1"
EXPECTED = "expected.json"
IDS = torch.tensor([[1, 5, 9, 33, 2, 17, 30, 8]])
LLAMA = {"vocab_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
GPT2 = {"n_embd": 16, "n_inner": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 16}


def base(root: Path, family: str = "llama", *, width: int = 16, blocks: int = 1, **changes: object) -> Checkpoint:
    """A random checkpoint in bfloat16."""
    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": blocks, "head_dim": width // 4}
    options = GPT2 if family == "gpt2" else {**LLAMA, **sizes}
    built = pico.model(family, **{**options, **changes})
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_((parameter * 64).round().clamp(-64, 64) / 64)
    built.to(torch.bfloat16).save_pretrained(root / "stock")
    return open_checkpoint(root / "stock")


def changed(checkpoint: Checkpoint, spec: Spec, values: Mapping[str, Value]) -> Checkpoint:
    """The checkpoint with that spec and those values; tensors that neither has are made at random."""
    made = dict(values)
    for seed, tensor in enumerate(spec.stored()):
        old = checkpoint.spec.tensors.get(tensor.name)
        if tensor.name not in made and (old is None or old.shape != tensor.shape):
            random = torch.randint(-24, 25, tensor.shape, generator=torch.Generator().manual_seed(seed))
            made[tensor.name] = Value((random / 64).bfloat16())
    return Derived(checkpoint, spec, lambda name: made[name] if name in made else checkpoint.tensor(name))


def kept(shape: tuple[int, ...], share: float, seed: int) -> torch.Tensor:
    """A keep-mask."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def coded(checkpoint: Checkpoint, quant_formats: Mapping[str, QuantFormat], share: float | None = None) -> Checkpoint:
    """Tensors whose names end so with codes of a grid, in bfloat16; a share of their weights removed if asked."""
    tensors, values = dict(checkpoint.spec.tensors), {}
    for seed, tensor in enumerate(checkpoint.spec.stored()):
        quant_format = next(
            (quant_format for end, quant_format in quant_formats.items() if tensor.name.endswith(f"{end}.weight")), None
        )
        if quant_format is None:
            continue
        data = checkpoint.tensor(tensor.name).data
        mask = None if share is None else kept(tensor.shape, share, seed)
        matrix = data if quant_format.is_codebook else data.flatten(1)
        keep = mask if mask is None or quant_format.is_codebook else mask.flatten(1)
        if quant_format.is_codebook:
            codes = codebook(matrix, quant_format, keep)
        elif quant_format.is_trellis:
            codes = trellis(matrix, quant_format)
        else:
            codes = integers(matrix, quant_format, keep)
        found = dequantize(
            codes, keep if quant_format.is_codebook or keep is None or not quant_format.transposed else keep.T
        )
        found = found.T.contiguous() if quant_format.transposed else found.reshape(tensor.shape)
        values[tensor.name] = Value(found, mask, codes)
        count = None if mask is None else int(mask.sum())
        tensors[tensor.name] = replace(tensor, dtype="BF16", quant_format=quant_format, kept=count)
    return changed(checkpoint, replace(checkpoint.spec, tensors=tensors), values)


def codebook(data: torch.Tensor, quant_format: QuantFormat, mask: torch.Tensor | None) -> Codes:
    """The nearest values of an even codebook."""
    half = 1 << (quant_format.bits - 1)
    values = torch.linspace(-1, 1, 2 * half).bfloat16()
    codes = (data.float()[..., None] - values.float()).abs().argmin(-1) - half
    return Codes((codes if mask is None else codes.masked_fill(~mask, 0)).to(torch.int8), values)


def trellis(data: torch.Tensor, quant_format: QuantFormat) -> Codes:
    """The nearest trellis codes."""
    rows = data.T if quant_format.transposed else data
    states, scale = trellis_nearest(rows.float().contiguous(), quant_format.bits)
    return Codes(states, ((scale * 64).round() / 64).bfloat16())


def integers(data: torch.Tensor, quant_format: QuantFormat, mask: torch.Tensor | None) -> Codes:
    """Codes rounded to nearest; with one scale for all where the grid says so."""
    rows, keep = (data.T, mask.T if mask is not None else None) if quant_format.transposed else (data, mask)
    if quant_format.whole:
        zero = None if quant_format.symmetric else torch.tensor([[5.0]])
        most = 448.0 if quant_format.format == "fp8" else 120.0
        codes = to_codes(
            rows, quant_format, Scales((rows.float().abs().max() / most).reshape(1, 1), zero), torch.bfloat16, keep
        )
    else:
        codes = rounded(rows.contiguous(), quant_format, torch.bfloat16, keep, search=False)
    given = {
        "input_scale": torch.tensor(
            [0.0625], dtype=torch.float32 if quant_format.given_dtype == "F32" else torch.bfloat16
        ),
        "input_zero_point": torch.tensor([-3], dtype=torch.int8),
        "input_global_scale": torch.tensor([448.0]),
    }
    return replace(codes, static_inputs={end: given[end] for end in quant_format.static_inputs})


def mask(root: Path) -> Checkpoint:
    """Keep-masks, dense where few weights are removed; bfloat16 and float16 side by side."""
    checkpoint = base(root)
    tensors, values = dict(checkpoint.spec.tensors), {}
    for seed, tensor in enumerate(checkpoint.spec.stored()):
        if len(tensor.shape) == 2 and tensor.dtype in FLOAT_DTYPES:
            found = kept(tensor.shape, 0.99 if "mlp" in tensor.name else 0.4, seed)
            name = "F16" if "q_proj" in tensor.name else "F32" if "k_proj" in tensor.name else "BF16"
            dtype = getattr(torch, FLOAT_DTYPES[name])
            values[tensor.name] = Value(checkpoint.tensor(tensor.name).data.to(dtype), found)
            tensors[tensor.name] = replace(tensor, dtype=name, kept=int(found.sum()))
    return changed(checkpoint, replace(checkpoint.spec, tensors=tensors), values)


def kernels(root: Path) -> Checkpoint:
    """Convolutions along the text, of one group and of several: packed integers with zero points, E4M3, removed weights."""
    sizes = {"hidden_size": 16, "embedding_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    grouped = {"vocab_size": 40, "num_attention_heads": 2, "max_position_embeddings": 16, "post_attention_groups": 2}
    torch.manual_seed(0)
    built = SqueezeBertForMaskedLM(SqueezeBertConfig(**sizes, **grouped)).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_((parameter * 1024).round().clamp(-64, 64) / 64)
    built.to(torch.bfloat16).save_pretrained(root / "stock")
    whole = {"query": QuantFormat("int4", 4, False), "key": QuantFormat("fp8"), "value": QuantFormat("codebook3")}
    checkpoint = coded(open_checkpoint(root / "stock"), whole)
    return coded(checkpoint, {"intermediate.conv1d": QuantFormat("int3", 4), "output.conv1d": QuantFormat("int8")}, 0.4)


EMBEDDING = {"embed_tokens": QuantFormat("int4", 8)}  # stock loaders take no codes there, so the file is a compact one


def packed(root: Path) -> Checkpoint:
    """Integers of every width in 32-bit words, by group and by channel."""
    quant_formats = {
        "q_proj": QuantFormat("int2", 8),
        "k_proj": QuantFormat("int3", 8),
        "v_proj": QuantFormat("int5"),
        "o_proj": QuantFormat("int6", 16),
    }
    return coded(
        base(root), {**EMBEDDING, **quant_formats, "gate_proj": QuantFormat("int8"), "up_proj": QuantFormat("int4")}
    )


def packed_zero(root: Path) -> Checkpoint:
    """The same with zero points."""
    quant_formats = {
        "q_proj": QuantFormat("int4", 8, False),
        "k_proj": QuantFormat("int3", 0, False),
        "up_proj": QuantFormat("int8", 16, False),
    }
    return coded(base(root), {**EMBEDDING, **quant_formats, "v_proj": QuantFormat("int2", 8, False)})


def int8(root: Path) -> Checkpoint:
    """Integers of a byte each, with all that is said of a layer's inputs."""
    return coded(
        base(root),
        {
            **EMBEDDING,
            "q_proj": QuantFormat("int8", activations="int8"),
            "k_proj": QuantFormat("int8", 8, False, activations="int8-zero"),
            "v_proj": QuantFormat("int8", whole=True, activations="int8-tensor"),
            "o_proj": QuantFormat(
                "int8", symmetric=False, whole=True, activations="int8-tensor-zero", given_dtype="F32"
            ),
            "up_proj": QuantFormat("int8", activations="int8-dynamic"),
        },
    )


def fp8(root: Path) -> Checkpoint:
    """E4M3 floats."""
    return coded(
        base(root),
        {
            **EMBEDDING,
            "q_proj": QuantFormat("fp8"),
            "k_proj": QuantFormat("fp8", 8, activations="fp8"),
            "v_proj": QuantFormat("fp8", whole=True, activations="fp8-tensor", given_dtype="F32"),
            "o_proj": QuantFormat("fp8", activations="fp8-dynamic"),
        },
    )


def blocks(root: Path) -> Checkpoint:
    """E4M3 floats with a scale for each 128 x 128, and with a power of two for each 32; inputs in groups."""
    inputs = {
        "gate_proj": QuantFormat("fp8", 128, block=True, activations="fp8-group"),
        "up_proj": QuantFormat("mxfp8", 32, activations="mxfp8"),
        "q_proj": QuantFormat("int4", 8, activations="int4"),
        "k_proj": QuantFormat("mxfp4", 32, activations="mxfp4"),
        "_proj": QuantFormat("mxfp4", 32),
    }
    return coded(base(root, width=128, intermediate_size=192), {**EMBEDDING, **inputs})


def mxfp4(root: Path) -> Checkpoint:
    """E2M1 floats with a power of two for each 32."""
    return coded(base(root, width=32), {**EMBEDDING, "_proj": QuantFormat("mxfp4", 32)})


def nvfp4(root: Path) -> Checkpoint:
    """E2M1 floats with an E4M3 scale for each 16 and a float for all."""
    inputs = {
        "q_proj": QuantFormat("nvfp4", 16, activations="nvfp4"),
        "k_proj": QuantFormat("nvfp4", 16, activations="nvfp4-wide"),
    }
    return coded(base(root), {**EMBEDDING, **inputs, "_proj": QuantFormat("nvfp4", 16)})


def codebooks(root: Path) -> Checkpoint:
    """Numbers of 2 to 8 bits of the values of codebooks."""
    modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return coded(base(root), {module: QuantFormat(f"codebook{bits}") for bits, module in enumerate(modules, 2)})


def masked_codes(root: Path) -> Checkpoint:
    """A keep-mask before packed integers, with zero points and without, before bytes, and before a codebook."""
    quant_formats = {
        "q_proj": QuantFormat("int4", 8),
        "k_proj": QuantFormat("int3", 8, False),
        "v_proj": QuantFormat("int8", activations="int8"),
    }
    return coded(
        base(root), {**quant_formats, "up_proj": QuantFormat("codebook3"), "down_proj": QuantFormat("int8", 8)}, 0.4
    )


def transposed(root: Path) -> Checkpoint:
    """Codes of matrices that the family shapes [in, out]."""
    quant_formats = {
        "attn.c_attn": QuantFormat("int4", 8, transposed=True),
        "c_fc": QuantFormat("fp8", transposed=True),
    }
    return coded(base(root, "gpt2"), {**quant_formats, "mlp.c_proj": QuantFormat("int5", 8, False, transposed=True)})


def masked_transposed(root: Path) -> Checkpoint:
    """The same before a keep-mask, in two shards."""
    quant_formats = {"attn.c_attn": QuantFormat("int4", 8, transposed=True), "c_fc": QuantFormat("codebook2")}
    return coded(base(root, "gpt2"), quant_formats, 0.4)


def trellises(root: Path) -> Checkpoint:
    """Trellis codes of every number of bits, of matrices shaped [in, out] and wider than one sequence."""
    formats = {"c_attn": "trellis2", "attn.c_proj": "trellis3", "mlp.c_fc": "trellis4", "mlp.c_proj": "trellis2"}
    return coded(
        base(root, "gpt2", n_inner=272), {end: QuantFormat(name, transposed=True) for end, name in formats.items()}
    )


def factors(root: Path) -> Checkpoint:
    """Two thin matrices in place of one, of a layer with a bias and one without."""
    checkpoint = base(root, attention_bias=True)
    ranks = {"model.layers.0.self_attn.q_proj.weight": 4, "model.layers.0.mlp.up_proj.weight": 3}
    biases = {f"model.layers.0.self_attn.q_proj.{part}" for part in ("bias", "up.bias")}
    found = checkpoint.tensor("model.layers.0.self_attn.q_proj.bias")
    return changed(checkpoint, factored(checkpoint.spec, ranks), dict.fromkeys(biases, found))


def factors_transposed(root: Path) -> Checkpoint:
    """Factors of a matrix that the family shapes [in, out]; they lie as [out, in] nonetheless."""
    checkpoint = base(root, "gpt2")
    spec = factored(checkpoint.spec, {"transformer.h.1.mlp.c_fc.weight": 3})
    bias = checkpoint.tensor("transformer.h.1.mlp.c_fc.bias")
    return changed(checkpoint, spec, {"transformer.h.1.mlp.c_fc.up.bias": bias})


def shared_residual(root: Path) -> Checkpoint:
    """A block with matrices of another one, each with a residual of its own."""
    checkpoint = base(root, blocks=2)
    return changed(
        checkpoint, shared(checkpoint.spec, [[0, 1]], ["self_attn.q_proj.weight", "mlp.up_proj.weight"], 2), {}
    )


def shared_norms(root: Path) -> Checkpoint:
    """A block with a matrix and a norm of another one, and no residual."""
    checkpoint = base(root, "gpt2")
    return changed(checkpoint, shared(checkpoint.spec, [[0, 1]], ["mlp.c_fc.weight", "ln_1.bias"], 0), {})


def projected_tied(root: Path) -> Checkpoint:
    """A thin table, read by embeddings and head, each with a projection."""
    checkpoint = base(root, tie_word_embeddings=True)
    spec = projected(checkpoint.spec, ["model.embed_tokens.weight", "lm_head.weight"], 6)
    source = spec.tensors["model.embed_tokens.weight"]
    tensors = {**spec.tensors, "lm_head.weight": alias(source, "lm_head.weight")}
    return changed(checkpoint, replace(spec, tensors=tensors), {})


def projected_untied(root: Path) -> Checkpoint:
    """A thin table for embeddings alone."""
    checkpoint = base(root)
    return changed(checkpoint, projected(checkpoint.spec, ["model.embed_tokens.weight"], 6), {})


def widths(root: Path) -> Checkpoint:
    """An MLP of its own width in the second block, in two shards."""
    checkpoint = base(root, blocks=2)
    path = "model.layers.1.mlp"
    shapes = {f"{path}.gate_proj": (10, 16), f"{path}.up_proj": (10, 16), f"{path}.down_proj": (16, 10)}
    tensors = dict(checkpoint.spec.tensors)
    for module, shape in shapes.items():
        tensors[f"{module}.weight"] = replace(tensors[f"{module}.weight"], shape=shape)
    return changed(checkpoint, sized(replace(checkpoint.spec, tensors=tensors), shapes), {})


def widths_transposed(root: Path) -> Checkpoint:
    """The same of matrices that the family shapes [in, out]."""
    checkpoint = base(root, "gpt2")
    path, tensors = "transformer.h.1.mlp", dict(checkpoint.spec.tensors)
    for name, shape in {"c_fc.weight": (16, 10), "c_fc.bias": (10,), "c_proj.weight": (10, 16)}.items():
        tensors[f"{path}.{name}"] = replace(tensors[f"{path}.{name}"], shape=shape)
    return changed(checkpoint, sized(replace(checkpoint.spec, tensors=tensors), [f"{path}.c_fc", f"{path}.c_proj"]), {})


def windows(root: Path) -> Checkpoint:
    """Heads with windows of their own, by every pattern; of one layer all heads."""
    checkpoint = base(root, blocks=4)
    common = {"window": 3, "sinks": 1, "heads": 2, "full": [1], "positions": 16}
    patterns: tuple[dict[str, object], ...] = (
        {"pattern": "window", "full": []},
        {"pattern": "strided", "stride": 2},
        {"pattern": "fixed", "keep": 1},
        {"pattern": "chunks"},
    )
    edits = {f"model.layers.{i}.self_attn": {**common, **more} for i, more in enumerate(patterns)}
    return changed(checkpoint, localised(checkpoint.spec, edits), {})


def projections(root: Path) -> Checkpoint:
    """An encoder whose attention reads projected keys and values."""
    checkpoint = base(root, "bert")
    return changed(checkpoint, projected_attention(checkpoint.spec, 4, 16, attentions(checkpoint.spec)), {})


MAKERS: dict[str, Callable[[Path], Checkpoint]] = {
    "mask": mask,
    "packed": packed,
    "packed-zero": packed_zero,
    "int8": int8,
    "fp8": fp8,
    "blocks": blocks,
    "mxfp4": mxfp4,
    "nvfp4": nvfp4,
    "codebooks": codebooks,
    "masked-codes": masked_codes,
    "transposed": transposed,
    "masked-transposed": masked_transposed,
    "factors": factors,
    "factors-transposed": factors_transposed,
    "shared-residual": shared_residual,
    "shared-norms": shared_norms,
    "projected-tied": projected_tied,
    "projected-untied": projected_untied,
    "widths": widths,
    "widths-transposed": widths_transposed,
    "windows": windows,
    "projections": projections,
    "kernels": kernels,
    "trellises": trellises,
}
SHARDED = {"masked-transposed": 6_000, "widths": 8_000}


def digest(checkpoint: Checkpoint) -> str:
    """SHA-256 of names, dtypes, shapes, values and keep-masks of all stored tensors, in order of names."""
    result = hashlib.sha256()
    for tensor in sorted(checkpoint.spec.stored(), key=lambda t: t.name):
        value = checkpoint.tensor(tensor.name)
        result.update(json.dumps([tensor.name, tensor.dtype, list(tensor.shape), value.mask is not None]).encode())
        result.update(value.data.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        if value.mask is not None:
            result.update(value.mask.numpy().tobytes())
    return result.hexdigest()


def logits(model: torch.nn.Module) -> list[float]:
    """What the model predicts after `IDS`, float32."""
    with torch.no_grad():
        return model(input_ids=IDS).logits[0, -1].float().tolist()


def expected(folder: Path) -> dict[str, object]:
    """What is recorded of a checkpoint: hashes of its tensors and of its unpacked ones, and logits."""
    model = compress.load(folder, dtype="float32")
    with tempfile.TemporaryDirectory() as temp:
        dense = None
        if not folder.name.startswith(("widths", "windows", "projections")):  # no stock class has these
            dense = digest(open_checkpoint(compress.unpack(folder, Path(temp) / "dense")))
    return {"tensors": digest(open_checkpoint(folder)), "unpacked": dense, "logits": logits(model)}


def main() -> None:
    """Make what is missing."""
    known = json.loads((FOLDER / EXPECTED).read_text()) if (FOLDER / EXPECTED).exists() else {}
    for name, make in MAKERS.items():
        if name in known:
            continue
        with tempfile.TemporaryDirectory() as temp:
            done = write_checkpoint(
                make(Path(temp)), FOLDER / name, store="compact", max_shard=SHARDED.get(name, 1 << 30)
            )
        (done.folder / bundle.FILE_NAME).unlink()
        (done.folder / "generation_config.json").unlink(missing_ok=True)
        known[name] = expected(done.folder)
        print(name, done.bytes, sorted({(*t.storage,) for t in done.spec.stored()}))
    (FOLDER / EXPECTED).write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
