"""Settings of `distill`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, create_model, model_validator

from compress.passes.base import PassSettings
from compress.settings import Settings

#: Losses on a teacher's predictions, and losses on its hidden states.
DIVERGENCES = ("kl", "reverse_kl", "skewed_kl", "js")
INSIDE = ("hidden", "cosine", "relations")
#: Defaults by preset.
PRESETS: dict[str, dict[str, Any]] = {
    "recover": {
        "learning_rate": None,
        "schedule": "cosine",
        "optimizer": "adamw",
        "weight_decay": 0.0,
        "dropout": False,
    },
    "from_scratch": {
        "learning_rate": 3e-3,
        "schedule": "wsd",
        "optimizer": "muon",
        "weight_decay": 0.1,
        "dropout": True,
    },
}


def _of_preset(name: str) -> Any:
    return lambda fields: PRESETS[fields["preset"]][name]


class Losses(Settings):
    """Weights of the losses. A loss without a weight is not used."""

    kl: float | None = Field(default=None, ge=0, description="KL(teacher ‖ student) of predictions (arXiv 1503.02531).")
    reverse_kl: float | None = Field(
        default=None, ge=0, description="KL(student ‖ teacher) of predictions (MiniLLM, arXiv 2306.08543)."
    )
    skewed_kl: float | None = Field(
        default=None,
        ge=0,
        description="KL(teacher ‖ `skew` · teacher + (1 - `skew`) · student) (DistiLLM, arXiv 2402.03898).",
    )
    js: float | None = Field(
        default=None, ge=0, description="Jensen-Shannon divergence of predictions (f-DISTILL, arXiv 2307.15190)."
    )
    labels: float | None = Field(
        default=None, ge=0, description="Cross-entropy with the next token, or with the labels of the data."
    )
    hidden: float | None = Field(
        default=None,
        ge=0,
        description="Squared distance of hidden states relative to the teacher's square, for the pairs in `layer_map` "
        "(TinyBERT, arXiv 1909.10351). Where widths differ, a projection is trained and then discarded.",
    )
    cosine: float | None = Field(
        default=None,
        ge=0,
        description="1 - cosine similarity of the last hidden states (DistilBERT, arXiv 1910.01108), or of sentence "
        "embeddings.",
    )
    relations: float | None = Field(
        default=None,
        ge=0,
        description="KL of the relations among queries, keys and values in one block (MiniLMv2, arXiv 2012.15828).",
    )

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.weights:
            raise ValueError("all losses have the weight 0: give one a weight")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """The weights above 0, by name."""
        given = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: float(weight) for name, weight in given.items() if weight}


class TeacherEntry(Settings):
    """One teacher of several."""

    checkpoint: str = Field(min_length=1, description="`original`, a folder or a hub id.")
    weight: float = Field(
        default=1.0, gt=0, description="Weight of this teacher's probabilities in the mean, relative to the others."
    )


def _teachers(value: Any) -> Any:
    entries = value if isinstance(value, (list, tuple)) else (value,)
    if not entries:
        raise ValueError("name at least one teacher")
    return tuple({"checkpoint": e} if isinstance(e, str) else e for e in entries)


TeacherList = Annotated[
    tuple[TeacherEntry, ...],
    BeforeValidator(_teachers),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "object"}]}, "minItems": 1},
            ],
            "examples": ["original", [{"checkpoint": "teacher-a", "weight": 2}, "teacher-b"]],
        }
    ),
]


class _Student(Settings):
    layers: int | None = Field(default=None, ge=1, description="Number of blocks. By default all.")
    mlp: int | None = Field(default=None, ge=1, description="Number of neurons of each MLP.")
    heads: int | None = Field(
        default=None,
        ge=1,
        description="Number of query heads of each block. Whole groups are removed where the number requires it.",
    )
    hidden: int | None = Field(default=None, ge=1, description="Number of hidden channels. For families with RMSNorm.")
    init: Literal["slice", "random"] = Field(
        default="slice",
        description="`slice`: weights of the checkpoint, from the units with the largest weights. `random`: new weights.",
    )


if TYPE_CHECKING:
    StudentSettings = _Student
else:
    # `from` is a keyword, so a class body cannot name a field so
    StudentSettings = create_model(
        "StudentSettings",
        __base__=_Student,
        **{
            "from": (
                Literal["spread", "every_second", "first", "last"],
                Field(
                    default="spread",
                    description="Blocks that are copied from the checkpoint. `spread`: evenly from the first to the last. "
                    "`every_second`: from the first on (DistilBERT, arXiv 1910.01108). `first`, `last`: only these.",
                ),
            )
        },
    )


class CacheSettings(Settings):
    """The teachers' predictions on disk."""

    folder: str = Field(
        min_length=1, description="Folder of the cache. Runs with the same teachers and samples share it."
    )
    top_k: int = Field(
        default=64, ge=1, le=4096, description="Tokens stored per position, by probability. All others are one bucket."
    )


def _cache(value: Any) -> Any:
    return {"folder": value} if isinstance(value, str) else value


class DistillSettings(PassSettings):
    """Settings of `distill`."""

    teacher: TeacherList = Field(
        default=(TeacherEntry(checkpoint="original"),),
        description="Teacher or teachers: `original` (the checkpoint that the run started from), a checkpoint, or a list of "
        "several with weights, whose probabilities are averaged. The teacher has the student's tokenizer.",
    )
    student: StudentSettings | None = Field(
        default=None,
        description="Shape of the student, which is cut from the checkpoint. By default the checkpoint itself, with its "
        "masks and tied tensors.",
    )
    preset: Literal["recover", "from_scratch"] = Field(
        default="recover",
        description="Defaults for learning rate, schedule, optimizer, weight decay and dropout. `recover`: restore what an "
        "earlier pass lost. `from_scratch`: a long training.",
    )
    losses: Losses | None = Field(
        default=None,
        description="Weight of each loss. By default `kl: 1`; for base models `cosine: 1`.",
    )
    temperature: float = Field(
        default=1.0,
        gt=0,
        description="Divides the logits before a divergence. The divergence is multiplied by its square (arXiv 1503.02531).",
    )
    skew: float = Field(default=0.1, gt=0, lt=1, description="Share of the teacher in the mixture of `skewed_kl`.")
    layer_map: tuple[tuple[int, int], ...] | None = Field(
        default=None,
        description="For the loss `hidden`: pairs of outputs [student, teacher]. 0 is the embeddings, 1 the first block. By "
        "default each block of the student is paired with the teacher's block at the same relative depth.",
    )
    relation_layers: tuple[int, int] | None = Field(
        default=None,
        description="For the loss `relations`: pair of block indices [student, teacher] from 0. By default the last blocks.",
    )
    relation_heads: int = Field(
        default=8, ge=1, description="For the loss `relations`: number of heads that vectors are split into."
    )
    steps: int | None = Field(
        default=None, ge=1, description="Optimizer steps. Without `steps`, `epochs` and `tokens`: one epoch."
    )
    epochs: float | None = Field(default=None, gt=0, description="Instead of `steps`: epochs over the training data.")
    tokens: int | None = Field(
        default=None, ge=1, description="Instead of `steps`: training tokens; a repeated token counts each time."
    )
    batch_size: int = Field(default=16, ge=1, description="Samples per step, over all processes.")
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="Samples per forward pass and process. Fewer need less memory and give the same result. By default all.",
    )
    learning_rate: float | None = Field(
        default_factory=_of_preset("learning_rate"),
        gt=0,
        description="Peak learning rate. By default 3e-3 from scratch. To recover 5e-4, times √(steps / 500) below 500 "
        "steps, times √(256 / width) for models wider than 256.",
    )
    schedule: Literal["cosine", "linear", "wsd", "constant"] = Field(
        default_factory=_of_preset("schedule"),
        description="Schedule of the learning rate. By default `cosine` to recover, `wsd` from scratch (warmup, stable, "
        "decay over the last 40 %; MiniCPM, arXiv 2404.06395).",
    )
    warmup_ratio: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Share of the steps over which the learning rate rises. By default a twentieth, or five steps if these "
        "are more and at most a quarter of all.",
    )
    optimizer: Literal["adamw", "muon", "adafactor"] = Field(
        default_factory=_of_preset("optimizer"),
        description="By default `adamw` to recover, `muon` (arXiv 2502.16982) from scratch (for matrices; in one process). "
        "`adafactor` (arXiv 1804.04235) needs the least memory.",
    )
    weight_decay: float = Field(
        default_factory=_of_preset("weight_decay"),
        ge=0,
        description="Weight decay of matrices. By default 0 to recover, 0.1 from scratch.",
    )
    dropout: bool = Field(
        default_factory=_of_preset("dropout"),
        description="Use the student's dropout in training. By default off to recover, on from scratch.",
    )
    max_grad_norm: float | None = Field(default=1.0, gt=0, description="Gradients are clipped to this norm.")
    autocast: Literal["bfloat16", "float16"] | None = Field(
        default=None, description="Narrow float format for matrix products. Weights stay float32 in training."
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass, so that only one block's are in memory."
    )
    compile: bool = Field(default=False, description="Compile the student with torch.compile. Needs a C++ compiler.")
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Keep an exponential moving average of the weights instead of the last ones: its decay, such as 0.99.",
    )
    validation_samples: int = Field(
        default=32, ge=1, description="Samples that are not trained on. The weights of least loss on them are kept."
    )
    evaluate_every: int | None = Field(
        default=None,
        ge=1,
        description="Steps between two validations; the state is saved there. By default a twentieth of all steps, or more.",
    )
    patience: int | None = Field(
        default=None, ge=1, description="Stop after this many validations without a lower loss."
    )
    teacher_cache: Annotated[CacheSettings, BeforeValidator(_cache)] | None = Field(
        default=None,
        description="Folder that stores the teachers' predictions, or {folder, top_k}. Stored predictions are not computed "
        "again.",
    )
    tensorboard: str | None = Field(default=None, min_length=1, description="Folder for TensorBoard logs.")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        lengths = [key for key in ("steps", "epochs", "tokens") if getattr(self, key) is not None]
        if len(lengths) > 1:
            raise ValueError(f"give one of `{lengths[0]}` and `{lengths[1]}`")
        if self.only or self.skip:
            raise ValueError("`only` and `skip` do not apply: all weights are trained")
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(f"`micro_batch_size` {self.micro_batch_size} is more than `batch_size` {self.batch_size}")
        if self.teacher_cache is not None and self.losses is not None:
            inside = [name for name in INSIDE if name in self.losses.weights]
            if inside:
                raise ValueError(f"`teacher_cache` stores predictions only: leave out the loss `{inside[0]}`")
        weights = {} if self.losses is None else self.losses.weights
        fields = type(self).model_fields
        for key, loss in (
            ("layer_map", "hidden"),
            ("relation_layers", "relations"),
            ("relation_heads", "relations"),
            ("skew", "skewed_kl"),
        ):
            if getattr(self, key) != fields[key].default and loss not in weights:
                raise ValueError(f"`{key}` is for the loss `{loss}`, which has no weight")
        if self.losses is not None and not set(weights).intersection(DIVERGENCES):
            if len(self.teacher) > 1:
                raise ValueError("several teachers are for losses that compare predictions, such as `kl`")
            if self.teacher_cache is not None:
                raise ValueError("`teacher_cache` stores predictions, and no loss compares with a teacher's")
        return self

    def needs_teacher(self) -> bool:
        """Whether any loss compares with a teacher."""
        return self.losses is None or any(name != "labels" for name in self.losses.weights)
