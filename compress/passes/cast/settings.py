"""Settings of `cast`, and the grid that they give a format."""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, Field, model_validator

from compress.passes.base import PassSettings
from compress.settings import ByteSize
from compress.spec.formats import FIXED_GROUPS, INTEGERS, QuantFormat

Format = Literal["bf16", "fp16", "fp32", "int8", "int6", "int5", "int4", "int3", "int2", "fp8", "mxfp4", "nvfp4"]
CodeFormat = Literal["int8", "int6", "int5", "int4", "int3", "int2", "fp8", "mxfp4", "nvfp4"]
#: What `gptq` adds to itself, in the order in which it does.
Correction = Literal["asymmetric", "alternating", "curvature"]
CORRECTIONS: tuple[Correction, ...] = get_args(Correction)
#: Formats that are no codes ▶ their dtypes in files.
DTYPES: dict[str, str] = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
#: Groups that a budget may choose instead of the usual 64.
_LARGER = ("128", "channel")


def _corrections(value: list[Correction]) -> list[Correction]:
    """In the order in which they work."""
    if twice := next((name for name in value if value.count(name) > 1), None):
        raise ValueError(f"`{twice}` is named twice")
    return [name for name in CORRECTIONS if name in value]


class CastSettings(PassSettings):
    """Settings of `cast`."""

    weights: Format | None = Field(
        default=None,
        description="Format of the weights. Floats (bf16, fp16, fp32; rounded to nearest even) apply to every tensor. Codes "
        "(int8 … int2; fp8, which is E4M3; mxfp4, nvfp4) apply to the matrices of blocks, and leave embeddings and head alone "
        "unless `overrides` names them. Either this, or a budget: `bits` or `max_bytes`.",
    )
    bits: float | None = Field(
        default=None,
        gt=1,
        le=16,
        description="Average bits per weight over what is cast, scales included: each matrix gets one of `formats`, so that "
        "the model's output changes least (measured by gradients on 32 samples, with the whole model in memory).",
    )
    max_bytes: ByteSize | None = Field(
        default=None, description="As `bits`, for the weight files of the whole checkpoint, embeddings and all: 500MB."
    )
    formats: list[CodeFormat] = Field(
        default=["int8", "int6", "int5", "int4", "int3", "int2"],
        min_length=2,
        description="What `bits` and `max_bytes` choose from, integers of less than 8 bits in groups of 64, 128 or a whole "
        "channel unless `group_size` is set. Matrices that read the same inputs get the same.",
    )
    overrides: dict[str, Format] = Field(
        default_factory=dict,
        description="Format by module pattern (glob, or `re:` expression); the first that matches wins over `weights`.",
    )
    group_size: int | Literal["channel"] | None = Field(
        default=None,
        description="Inputs that share a scale, or `channel`: one scale for each output. By default 64 for integers of less "
        "than 8 bits, and `channel` for int8 and fp8; mxfp4 and nvfp4 have groups of 32 and 16.",
    )
    symmetric: bool = Field(default=True, description="Integers without zero points.")
    method: Literal["rtn", "mse", "gptq"] = Field(
        default="gptq",
        description="How codes are chosen: `gptq` makes up for each rounding by the weights not yet rounded, and reads "
        "calibration data. Without data: `rtn` rounds to nearest between the extremes of each group, as fast as files are "
        "read; `mse` searches the ends of the range for the least squared error.",
    )
    error_correction: Annotated[list[Correction], AfterValidator(_corrections)] = Field(
        default=list(CORRECTIONS),
        description="With `method: gptq`, below 6 bits: methods that reduce the rounding error further. `asymmetric`: each "
        "matrix matches the original's outputs on the original's inputs, so it corrects the error of earlier layers (GPTAQ, "
        "arXiv 2504.02692). `alternating`: codes and scales are improved in turns, each exactly while the other stands "
        "(QuantEase, arXiv 2309.01885). `curvature`: output errors are weighted by their effect on the loss, in models that "
        "predict tokens; other models skip it (YAQA, arXiv 2505.22988). It measures gradients of up to 32768 tokens with one "
        "block in memory; they take disk space in the work folder, one float per token, hidden channel and block. An empty "
        "list with `reconstruction_epochs: 0` is GPTQ alone, which takes about a seventh of the time.",
    )
    reconstruction_epochs: int = Field(
        default=1,
        ge=0,
        description="With `gptq`: passes over the calibration data in which each block's scales, norms and biases are moved "
        "by gradient towards the original's output; 0 for none. Left out where all codes have 6 bits or more.",
    )
    reconstruction_lr: float = Field(
        default=0.006, gt=0, lt=1, description="Step of the tuning, in units of each tensor's own size."
    )
    activations: Literal["int8", "fp8"] | None = Field(
        default=None,
        description="Quantise the inputs of the cast layers while running, token by token (dynamic), in the format of the "
        "weights: int8 or fp8. It stands in the config; stock transformers, vLLM and SGLang do it, and figures here "
        "include it. Not in the compact store.",
    )
    kv_cache: Literal["fp8"] | None = Field(
        default=None,
        description="Say in the config that keys and values are to be cached in fp8 (E4M3) while running. For causal language "
        "models and codes that compressed-tensors holds. vLLM and SGLang do it, stock transformers 5.24 does not; figures here "
        "include it (`data.evaluation.quantized_kv_cache: false` leaves it out).",
    )
    kv_cache_scales: Literal["tensor", "head", "none"] | None = Field(
        default=None,
        description="Scales of that cache, found on calibration data: one for the keys of each layer and one for its values "
        "(`tensor`), or one for each head of them (`head`); or `none` in the files: then vLLM takes 1, and SGLang does not "
        "quantise. By default `tensor` where the recipe has `data.calibration`, else `none`. Families whose scales servers do "
        "not read (GPT-NeoX, OPT, Bloom) get none.",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if sum(value is not None for value in (self.weights, self.bits, self.max_bytes)) != 1:
            raise ValueError("give one of `weights`, `bits` and `max_bytes`")
        formats = self.asked
        if isinstance(self.group_size, int) and self.group_size < 1:
            raise ValueError("`group_size` is a number from 1 up, or `channel`")
        if fixed := next((f for f in formats if f in FIXED_GROUPS and self.group_size is not None), None):
            raise ValueError(f"{fixed} has groups of {FIXED_GROUPS[fixed]}: leave `group_size` out")
        if self.activations is not None and formats - set(DTYPES) != {self.activations}:
            raise ValueError(f"`activations: {self.activations}` goes with `weights: {self.activations}`")
        if self.kv_cache is not None and not self.coded:
            raise ValueError("`kv_cache` stands in the config of codes, and none are asked for")
        if self.kv_cache_scales is not None and self.kv_cache is None:
            raise ValueError("`kv_cache_scales` goes with `kv_cache`")
        return self

    @property
    def static_cache(self) -> Literal["tensor", "head"] | None:
        """Whether scales of the cache are found on calibration data: by layer, or by head."""
        return None if self.kv_cache_scales == "none" else self.kv_cache_scales

    @property
    def budgeted(self) -> bool:
        """Whether formats are chosen within a budget."""
        return self.weights is None

    @property
    def asked(self) -> set[str]:
        """Every format that may come out."""
        return {*([self.weights] if self.weights is not None else self.formats), *self.overrides.values()}

    @property
    def coded(self) -> bool:
        """Whether any weight may become codes."""
        return bool(self.asked - set(DTYPES))

    @property
    def solved(self) -> bool:
        """Whether codes are chosen block by block."""
        return self.coded and self.method == "gptq"

    @property
    def options(self) -> dict[str, str]:
        """What a budget chooses from, as `quant_format` takes it ▶ the format.

        Where ``group_size`` is not set, integers of less than 8 bits come in larger groups too: what those save in scales may
        buy more bits.
        """
        result: dict[str, str] = {format_: format_ for format_ in self.formats}
        if self.group_size is None:
            finer = [f for f in self.formats if INTEGERS.get(f, 8) < 8]
            result |= {f"{format_}/{size}": format_ for format_ in finer for size in _LARGER}
        return result

    def quant_format(self, option: str) -> QuantFormat:
        """The grid of a format with these settings; of an option, with its own size of groups."""
        format_, _, own = option.partition("/")
        group = FIXED_GROUPS.get(format_)
        if group is None:
            size = self.group_size if not own else "channel" if own == "channel" else int(own)
            group = (64 if INTEGERS.get(format_, 8) < 8 else 0) if size is None else 0 if size == "channel" else size
        symmetric = self.symmetric or format_ not in INTEGERS
        activations = self.activations if format_ == self.activations else None
        return QuantFormat(format_, group, symmetric, activations=activations)
