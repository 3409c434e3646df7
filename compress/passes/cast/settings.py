"""Settings of `cast`, and the quantisation format that they select."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import AfterValidator, Field, PrivateAttr, model_validator

from compress.blockwise.memory_budget import GRADIENT_TOKENS
from compress.passes.base import PassSettings
from compress.passes.cast.schemes import SCHEMES, SchemeName
from compress.passes.effort import Effort, EffortDefaults
from compress.settings import ByteSize, distinct
from compress.spec.formats import BLOCK, FIXED_GROUPS, INTEGERS, TRELLISES, QuantFormat
from compress.spec.spec import Runtime

Format = Literal[
    "bf16",
    "fp16",
    "fp32",
    "int8",
    "int6",
    "int5",
    "int4",
    "int3",
    "int2",
    "fp8",
    "mxfp8",
    "mxfp4",
    "nvfp4",
    "trellis4",
    "trellis3",
    "trellis2",
]
CodeFormat = Literal[
    "int8", "int6", "int5", "int4", "int3", "int2", "fp8", "mxfp8", "mxfp4", "nvfp4", "trellis4", "trellis3", "trellis2"
]  # fmt: skip
#: Formats of `ACTIVATIONS` that `cast` writes.
Activation = Literal["int8", "int4", "fp8", "fp8-group", "fp8-tensor", "mxfp8", "mxfp4", "nvfp4"]
#: Those with a static scale, which is measured on calibration data.
STATIC: tuple[Activation, ...] = ("fp8-tensor", "nvfp4")
#: Format of the weights ▶ the formats of inputs that go with it.
_INPUTS: dict[str, tuple[Activation, ...]] = {
    "int8": ("int8",),
    "int6": ("int8",),
    "int5": ("int8",),
    "int4": ("int8", "int4", "fp8"),
    "int3": ("int8", "int4"),
    "int2": ("int8", "int4"),
    "fp8": ("fp8", "fp8-tensor"),
    "fp8 in blocks": ("fp8-group",),
    "mxfp8": ("mxfp8",),
    "mxfp4": ("mxfp4", "fp8-group"),
    "nvfp4": ("nvfp4",),
}
#: Corrections after and before `gptq`, in the order in which they work.
Correction = Literal["asymmetric", "alternating", "curvature"]
CORRECTIONS: tuple[Correction, ...] = get_args(Correction)
#: Rotations that are folded into the weights.
RotatedStates = Literal["residual", "values"]
#: Float formats ▶ their dtypes in files.
DTYPES: dict[str, str] = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
#: Defaults by effort: `fast` is GPTQ alone.
EFFORTS = EffortDefaults(
    fast={"error_correction": [], "curvature_tokens": 4096, "reconstruction_epochs": 0},
    balanced={"error_correction": ["asymmetric", "curvature"], "curvature_tokens": 1024, "reconstruction_epochs": 0},
    best={"error_correction": list(CORRECTIONS), "curvature_tokens": GRADIENT_TOKENS, "reconstruction_epochs": 1},
)
#: Group sizes that a budget may choose instead of 64.
_LARGER = ("128", "channel")
#: Bits of a code from which on its rounding errors are like noise: a divergence follows their squared sum.
_LIKE_NOISE: tuple[tuple[Mapping[str, int], int], ...] = ((INTEGERS, 4), (TRELLISES, 3))


def _corrections(value: list[Correction]) -> list[Correction]:
    """The corrections in the order in which they work. Raises `ValueError` for a repetition."""
    distinct(tuple(value))
    return [name for name in CORRECTIONS if name in value]


def _distinct(value: list[RotatedStates]) -> list[RotatedStates]:
    """The rotations, unchanged. Raises `ValueError` for a repetition."""
    distinct(tuple(value))
    return value


def _of_scheme(key: str, otherwise: Any = None) -> Callable[[dict[str, Any]], Any]:
    """The default of a field: what the scheme says, if there is one."""

    def default(fields: dict[str, Any]) -> Any:
        scheme = fields["scheme"]
        return otherwise if scheme is None else SCHEMES[scheme].settings()[key]

    return default


class CastSettings(PassSettings):
    """Settings of `cast`."""

    efforts: ClassVar[EffortDefaults | None] = EFFORTS
    effort: Effort = EFFORTS.setting()
    scheme: SchemeName | None = Field(
        default=None,
        description="A scheme of compressed-tensors by its name. It stands for `weights`, `symmetric`, `activations` and a "
        "default group size, 128 for integers but W8A8: matrices whose inputs 128 does not divide get groups of 64 or 32, or "
        "one scale per output.",
    )
    weights: Format | None = Field(
        default_factory=_of_scheme("weights"),
        description="Format of the weights; or name a `scheme`, or give a budget, `bits` or `max_bytes`. Floats (bf16, fp16, "
        "fp32) apply to every tensor and round to nearest even. Codes (int8 … int2; fp8, which is E4M3; mxfp8; mxfp4; nvfp4; "
        "trellis4 … trellis2) apply to the matrices of blocks. Trellis codes (QTIP, arXiv 2406.11235) are the most accurate at "
        "2 to 4 bits; only `store: compact` holds them. Embeddings and head keep their format unless `overrides` names them.",
    )
    bits: float | None = Field(
        default=None,
        gt=1,
        le=16,
        description="Budget: average bits per weight over all cast matrices, scales included. Each matrix gets one of "
        "`formats`, so that the KL divergence of the model's predictions is least. The divergence is estimated from "
        "gradients on 32 samples, to second order (Fisher information), with one block in memory.",
    )
    max_bytes: ByteSize | None = Field(
        default=None,
        description="Budget: bytes of the whole checkpoint's weight files, embeddings included, such as 500MB. Formats are "
        "chosen as with `bits`.",
    )
    formats: list[CodeFormat] = Field(
        default=["int8", "int6", "int5", "int4", "int3", "int2"],
        min_length=2,
        description="Formats that `bits` and `max_bytes` choose from. Integers below 8 bits are tried with groups of 64, "
        "128 and a whole channel unless `group_size` is set. Trellis codes are among them only if they are named, such as "
        "[int8, int6, int5, trellis4, trellis3, trellis2]. Matrices with the same inputs get the same format.",
    )
    overrides: dict[str, Format] = Field(
        default_factory=dict,
        description="Format by module pattern (glob, or `re:` expression). The first pattern that matches wins over "
        "`weights`.",
    )
    group_size: int | Literal["channel", "block", "tensor"] | None = Field(
        default=None,
        description="Number of inputs that share a scale, or `channel` for one scale per output. `block`, for fp8: one scale "
        "for 128 outputs and 128 inputs; matrices that such blocks do not fit get one scale per output. `tensor`, for fp8: one "
        "scale for the whole matrix. By default 64 for "
        "integers below 8 bits, `channel` for int8 and fp8. Matrices whose inputs 64 does not divide then get groups of 32, or "
        "one scale per output. A number given here must divide all inputs. The groups of mxfp8 and mxfp4 have 32 inputs, those "
        "of nvfp4 16.",
    )
    fused_experts: bool | None = Field(
        default=None,
        description="Cast experts that the files hold in one tensor (gpt-oss, Granite MoE) to codes too. Stock loaders cannot "
        "read such codes, so the default is true with `store: compact` alone.",
    )
    convolutions: bool | None = Field(
        default=None,
        description="Cast the kernels of convolutions inside the blocks to codes too: a kernel [out, in, *positions] as the "
        "matrix [out, in x positions]. The first convolution and depthwise ones keep their format unless `only` or "
        "`overrides` name them. Stock loaders cannot read such codes, so the default is true with `store: compact` alone.",
    )
    symmetric: bool = Field(default_factory=_of_scheme("symmetric", True), description="Integers without zero points.")
    method: Literal["rtn", "mse", "gptq"] = Field(
        default="gptq",
        description="How codes are chosen. `gptq`: round column by column; later columns compensate for the error (GPTQ, "
        "arXiv 2210.17323). It reads calibration data and works in act-order. `rtn`: round to nearest between the extremes "
        "of each group. `mse`: round to nearest within the range of least squared error. `rtn` and `mse` need no data.",
    )
    error_correction: Annotated[list[Correction], AfterValidator(_corrections)] = Field(
        default_factory=EFFORTS.of("error_correction"),
        description="With `method: gptq`, below 6 bits: methods that reduce the error further. `asymmetric`: each matrix "
        "matches the original's outputs on the original's inputs, so it corrects the error of earlier layers, as far as "
        "held-out samples confirm it (GPTAQ, arXiv 2504.02692). `alternating`: improve codes and scales in turns "
        "(QuantEase, arXiv 2309.01885). `curvature`: weigh "
        "output errors by their effect on the loss (YAQA, arXiv 2505.22988). It needs a model that predicts tokens and is "
        "skipped for others. It takes gradients of some tokens, with one block in memory and one float per token, "
        "hidden channel and block on disk. With an empty list and `reconstruction_epochs: 0`, GPTQ runs alone.",
    )
    curvature_tokens: int = Field(
        default_factory=EFFORTS.of("curvature_tokens"),
        ge=1,
        description="Calibration tokens whose gradients `curvature` takes, at most.",
    )
    reconstruction_epochs: int = Field(
        default_factory=EFFORTS.of("reconstruction_epochs"),
        ge=0,
        description="With `method: gptq`, below 6 bits: epochs of block reconstruction (BRECQ, arXiv 2102.05426). Scales, "
        "norms and biases of each block are trained towards the original block's output. 0 for none.",
    )
    reconstruction_lr: float = Field(
        default=0.006,
        gt=0,
        lt=1,
        description="Learning rate of block reconstruction, relative to the size of each tensor's values.",
    )
    activations: Activation | None = Field(
        default_factory=_of_scheme("activations"),
        description="Record in the config that the inputs of cast layers are quantised while the model runs. int8, int4 and "
        "fp8 have a scale per token; fp8-group one for each 128 inputs of a token; mxfp8 and mxfp4 a power of two for each "
        "32. Integers take int8, up to 4 bits also int4, and int4 weights fp8; fp8 weights take fp8, with `group_size: block` "
        "fp8-group; mxfp8 takes mxfp8; mxfp4 takes mxfp4 or fp8-group. fp8-tensor, for fp8, has one static scale for all "
        "tokens; nvfp4, for nvfp4, a scale for each 16 inputs and a static one for these. Static scales are measured on "
        "calibration data, and `method: rtn` needs it too then. Stock transformers applies it, and servers that have "
        "a kernel for it; reported metrics include it. Not for the compact store.",
    )
    smoothing: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Divide inputs by a factor for each channel before anything is rounded, max|x|^smoothing / "
        "max|w|^(1 - smoothing), and multiply the weights that read them (SmoothQuant, arXiv 2211.10438). Norms, value "
        "projections and up projections take the factor, so that the model computes the same. 0.5 is usual. It needs "
        "calibration data.",
    )
    rotations: Annotated[list[RotatedStates], AfterValidator(_distinct)] = Field(
        default_factory=list,
        description="Rotate the model before anything is rounded, by random signs and Hadamard matrices that are folded into "
        "the weights (QuaRot, arXiv 2404.00456; R1 and R2 of SpinQuant, arXiv 2405.16406). `residual`: the hidden states "
        "between blocks; for RMSNorm. Norms are folded first, so a head that is tied to the embeddings gets weights of its "
        "own. `values`: the values of each head. The model computes the same.",
    )
    kv_cache: Literal["fp8"] | None = Field(
        default=None,
        description="Record in the config that keys and values are cached in fp8 (E4M3). For causal language models with "
        "codes that compressed-tensors can express. vLLM and SGLang apply it, stock transformers 5.24 does not. Reported "
        "metrics include it unless `data.evaluation.quantized_kv_cache` is false.",
    )
    kv_cache_scales: Literal["tensor", "head", "none"] | None = Field(
        default=None,
        description="Scales of the fp8 cache. `tensor`: one for the keys and one for the values of each layer. `head`: one "
        "for each head of them. Both are measured on calibration data. `none`: no scales in the files; vLLM then takes 1, "
        "SGLang does not quantise. By default `tensor` with `data.calibration`, else `none`. Families whose scales no "
        "server reads (GPT-NeoX, OPT, Bloom) get none.",
    )

    runtime: Runtime = Field(
        default="transformers",
        description="What opens the codes in `store: stock`. vLLM reads more than stock transformers: zero points, int8, "
        "int4 and int2 codes of the table of tokens (`overrides: {model.embed_tokens: int4}`), and experts in every scheme "
        "that it has a kernel for. A head that shares the table's weights gets codes of its own then, because vLLM reads no "
        "shared ones.",
    )

    _store: Literal["stock", "compact"] = PrivateAttr(default="stock")

    @property
    def store(self) -> Literal["stock", "compact"]:
        """The recipe's store, for budgets of bytes."""
        return self._store

    def stored_in(self, store: Literal["stock", "compact"]) -> Self:
        """The settings of a recipe with that store."""
        copy = self.model_copy()
        copy._store = store
        return copy

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self._check_scheme()
        if sum(value is not None for value in (self.weights, self.bits, self.max_bytes)) != 1:
            raise ValueError("give one of `scheme`, `weights`, `bits` and `max_bytes`")
        formats = self.formats_used
        if isinstance(self.group_size, int) and self.group_size < 1:
            raise ValueError("`group_size` is a number from 1 up, `channel`, `block` or `tensor`")
        if self.group_size is not None and formats & set(TRELLISES):
            raise ValueError("trellis codes have one scale for each output: leave `group_size` out")
        if fixed := next((f for f in formats if f in FIXED_GROUPS and self.group_size is not None), None):
            raise ValueError(f"{fixed} has groups of {FIXED_GROUPS[fixed]}: leave `group_size` out")
        if self.group_size in ("block", "tensor") and not formats <= {"fp8", *DTYPES}:
            raise ValueError(f"`group_size: {self.group_size}` goes with `weights: fp8`")
        self._check_activations(formats - set(DTYPES))
        if self.smoothing is not None and not self.coded:
            raise ValueError(
                "`smoothing` needs codes, such as `scheme: W8A8`: it changes the inputs of what is rounded"
            )
        if self.kv_cache is not None and not self.coded:
            raise ValueError("`kv_cache` needs codes, such as `weights: int8`: it is recorded in their config")
        if self.kv_cache_scales is not None and self.kv_cache is None:
            raise ValueError("`kv_cache_scales` goes with `kv_cache`")
        return self

    def _check_scheme(self) -> None:
        """Raise `ValueError` for a setting that is not that of the scheme."""
        for key, value in {} if self.scheme is None else SCHEMES[self.scheme].settings().items():
            if getattr(self, key) != value:
                raise ValueError(f"`{key}` is part of `scheme: {self.scheme}`: leave one of both out")

    def _check_activations(self, formats: set[str]) -> None:
        """Raise `ValueError` where some of these formats do not go with the inputs' format."""
        if self.activations is None:
            return
        if not formats:
            raise ValueError(f"`activations: {self.activations}` needs codes, such as `weights: int8`")
        for format_ in sorted(formats):
            name = "fp8 in blocks" if (format_, self.group_size or self._scheme_group) == ("fp8", "block") else format_
            takes = _INPUTS.get(name, ())
            if self.activations not in takes:
                goes = f"{name} takes {' or '.join(takes)}" if takes else f"{name} takes no quantised inputs"
                raise ValueError(f"`activations: {self.activations}` does not go with `weights: {format_}`: {goes}")

    @property
    def _scheme_group(self) -> int | Literal["block", "tensor"] | None:
        """The group size of the scheme."""
        return None if self.scheme is None else SCHEMES[self.scheme].group

    @property
    def static_cache(self) -> Literal["tensor", "head"] | None:
        """The kind of calibrated cache scales, per layer or per head; None without calibration."""
        return None if self.kv_cache_scales == "none" else self.kv_cache_scales

    @property
    def static_inputs(self) -> bool:
        """Whether inputs have static scales."""
        return self.activations in STATIC

    @property
    def measured(self) -> bool:
        """Whether magnitudes of inputs, keys or values are measured on calibration data."""
        return self.static_cache is not None or self.static_inputs or self.smoothing is not None

    @property
    def budgeted(self) -> bool:
        """Whether a budget chooses the formats."""
        return self.weights is None

    @property
    def formats_used(self) -> set[str]:
        """Every format that the result may have."""
        return {*([self.weights] if self.weights is not None else self.formats), *self.overrides.values()}

    @property
    def coded(self) -> bool:
        """Whether the result may have codes."""
        return bool(self.formats_used - set(DTYPES))

    @property
    def solved(self) -> bool:
        """Whether codes are chosen block by block on calibration data."""
        return self.coded and self.method == "gptq"

    def correction(self, quant_formats: Collection[QuantFormat]) -> list[Correction]:
        """The corrections that apply to any of these formats: `asymmetric` alone applies to trellis codes."""
        trellises = all(quant_format.is_trellis for quant_format in quant_formats)
        return [name for name in self.error_correction if name == "asymmetric" or not trellises]

    @property
    def options(self) -> dict[str, str]:
        """Options of a budget, as `quant_format` takes them ▶ the option whose divergence is measured for it.

        Integers of four bits and more round like noise, so that one of them is measured, and so do trellis codes of three.
        Without ``group_size``, integers below 8 bits also come in larger groups: the bytes saved on scales can buy more bits.
        """
        result: dict[str, str] = {f: f for f in self.formats}
        for kind, bits in _LIKE_NOISE:
            fine = [f for f in self.formats if kind.get(f, 0) >= bits]
            result |= dict.fromkeys(fine, min(fine, key=kind.__getitem__, default=""))
        if self.group_size is None:
            grouped = [f for f in self.formats if INTEGERS.get(f, 8) < 8]
            result |= {f"{format_}/{size}": result[format_] for format_ in grouped for size in _LARGER}
        return result

    def _usual_group(self, format_: str) -> int | Literal["channel", "block", "tensor"]:
        """The group size of an integer format or fp8 without ``group_size``."""
        own = self._scheme_group if self.scheme is not None and SCHEMES[self.scheme].weights == format_ else None
        return own or (64 if INTEGERS.get(format_, 8) < 8 else "channel")

    def quant_format(self, option: str) -> QuantFormat:
        """The quantisation format with these settings; an option has its own group size."""
        format_, _, own = option.partition("/")
        group: int | str | None = FIXED_GROUPS.get(format_)
        if group is None:
            group = own or self.group_size or self._usual_group(format_)
        block, whole = group == "block", group == "tensor"
        size = BLOCK if block else 0 if whole or group == "channel" else int(group)
        symmetric = self.symmetric or format_ not in INTEGERS
        return QuantFormat(format_, size, symmetric, activations=self.activations, whole=whole, block=block)
