"""Models that runtimes open, and what this package makes of them: checkpoints and exports under build/runtimes/artefacts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from compress.errors import CompressError
from tools.runtimes.environments import BUILD

EXAMPLES = BUILD.parent.parent / "examples"
TEXT, TRAIN, TINY = EXAMPLES / "text" / "valid.txt", EXAMPLES / "text" / "train.txt", EXAMPLES / "tiny-lm"
DATA: dict[str, Any] = {"data": TRAIN, "samples": 16, "length": 128, "document_separator": "<|doc|>"}
RTN: dict[str, Any] = {"method": "rtn"}


class Artefact(NamedTuple):
    """A result of one pass; without a pass the model itself.

    Attributes:
        what: in words. settings: of the pass, and of `compress.apply`.
    """

    what: str
    name: str = "cast"
    settings: Mapping[str, Any] = {}


FOR_VLLM: dict[str, Any] = {"runtime": "vllm"}


def _cast(what: str, **settings: Any) -> Artefact:
    return Artefact(what, "cast", RTN | settings)


DENSE = {"bf16": Artefact("as it is", "")}
FEW = {
    "int4": _cast("a scale for 32 inputs", weights="int4", group_size=32),
    "int8": _cast("a scale for each output", weights="int8"),
}
CODES = {
    **{f"int{bits}": _cast("a scale for 32 inputs", weights=f"int{bits}", group_size=32) for bits in (6, 5, 3, 2)},
    "mixed": _cast(
        "int4; down_proj int8, o_proj bf16", weights="int4", overrides={"*down_proj": "int8", "*o_proj": "bf16"}
    ),
    "W8A8": _cast("int8, inputs in int8", scheme="W8A8"),
    "W4A8": _cast("int4, inputs in int8", scheme="W4A8", group_size=32),
    "fp8": _cast("weights alone", weights="fp8"),
    "FP8_DYNAMIC": _cast("inputs in fp8", scheme="FP8_DYNAMIC"),
    "FP8_BLOCK": _cast("blocks of 128 × 128, inputs in fp8", scheme="FP8_BLOCK"),
    "fp8 cache": _cast(
        "FP8_DYNAMIC; keys and values in fp8, static scales", scheme="FP8_DYNAMIC", kv_cache="fp8", **DATA
    ),
    "int4 zeros": _cast("zero points, `runtime: vllm`", weights="int4", group_size=32, symmetric=False, **FOR_VLLM),
    "int4 table": _cast(
        "the table of tokens too, `runtime: vllm`",
        **{"weights": "int4", "group_size": 32, "overrides": {"model.embed_tokens": "int4"}, **FOR_VLLM},
    ),
    "mxfp8": _cast("weights alone", weights="mxfp8"),
    "mxfp4": _cast("weights alone", weights="mxfp4"),
    "nvfp4": _cast("weights alone", weights="nvfp4"),
    "NVFP4": _cast("nvfp4, inputs in nvfp4", scheme="NVFP4", **DATA),
}
HALF: dict[str, Any] = {"sparsity": "50%", "method": "magnitude"}
COMPACT: dict[str, Any] = {"store": "compact"}
FAST: dict[str, Any] = {"effort": "fast", **COMPACT, **DATA}
PRUNED = {
    "narrow": Artefact(
        "a block and a quarter of the neurons removed",
        "prune_structured",
        {"layers": 1, "mlp": "25%", "multiple_of": 32, **DATA},
    ),
    "masked": Artefact("half of the weights zero, dense", "prune_unstructured", HALF),
    "bitmask": Artefact("half of the weights, compact", "prune_unstructured", HALF | COMPACT),
    "factors": Artefact("two factors for each matrix, compact", "factorize", {"keep_parameters": "70%", **FAST}),
    "shared": Artefact("three blocks, each used twice, compact", "share", {"groups": 3, **FAST}),
    "zero points": _cast("int4 with zero points, compact", weights="int4", group_size=32, symmetric=False, **COMPACT),
    "trellis": Artefact(
        "trellis codes of 3 bits in a block, compact", "cast", {"weights": "trellis3", "only": ["*layers.0.*"], **FAST}
    ),
}
#: Tokens that are decoded.
NEW = 64
CAUSAL = (
    "transformers",
    "vLLM",
    "llama.cpp",
    "onnxruntime",
    "onnxruntime-genai",
    "OpenVINO",
    "transformers.js",
)
SERVED = ("transformers", "vLLM", "llama.cpp", "onnxruntime", "onnxruntime-genai")


class Model(NamedTuple):
    """A model, its artefacts and the runtimes that open them.

    Attributes:
        what: in words. tokens: of the text that are scored.
    """

    what: str
    folder: Path
    artefacts: Mapping[str, Artefact]
    runtimes: tuple[str, ...] = CAUSAL
    tokens: int = 256


MODELS = {
    "tiny-lm": Model("`examples/tiny-lm`, a Llama", TINY, DENSE | FEW | CODES | PRUNED),
}


def add(folder: Path, recipe: Path, sets: list[str]) -> str:
    """Add a causal model whose artefact a recipe makes, with exports to gguf and onnx; its name is that of the folder."""
    made = {
        recipe.stem: Artefact(
            f"`{recipe.name}`{''.join(f', {one}' for one in sets)}", "", {"recipe": recipe, "sets": sets}
        )
    }
    MODELS[folder.name] = Model(f"`{folder.name}`", folder, DENSE | made, SERVED, 1000)
    return folder.name


def artefact(model: str, name: str, form: str) -> Path:
    """A checkpoint, or its export (``form``: onnx, gguf), written on first use. Raises `CompressError` where it is refused."""
    import compress

    made = MODELS[model].artefacts[name]
    place = BUILD / "artefacts" / model / name.replace(" ", "-")
    source = place if made.settings else MODELS[model].folder
    if "recipe" in made.settings and not source.exists():
        sets = [f"model={MODELS[model].folder}", f"output={source}", *made.settings["sets"]]
        compress.run(made.settings["recipe"], sets=sets, publish_anyway=True, progress=False)
    elif not source.exists():
        compress.apply(made.name, MODELS[model].folder, source, progress=False, **made.settings)
    if form == "checkpoint":
        return source
    path = place.with_name(place.name + ("-onnx" if form == "onnx" else ".gguf"))
    refused = Path(f"{path}.refused")
    if refused.exists():
        raise CompressError(refused.read_text())
    if not path.exists():
        try:
            compress.export(source, path, to=form, progress=False)
        except CompressError as error:
            refused.write_text(f"{error.what}; {error.fix}" if error.fix else error.what)
            raise CompressError(refused.read_text()) from error
    return path


def asked(model: str) -> Path:
    """File with token ids of the held-out text, and the text."""
    from tokenizers import Tokenizer

    path, text = BUILD / "asked" / f"{model}.json", TEXT.read_text()[:20_000]
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(MODELS[model].folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    content = {"ids": ids[: MODELS[model].tokens], "prompt": ids[:32], "new_tokens": NEW, "text": text, "text_ids": ids}
    path.write_text(json.dumps(content))
    return path
