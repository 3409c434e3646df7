"""Settings of `distill`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, create_model, model_validator

from compress.passes.base import PassSettings
from compress.settings import Settings

#: Losses that compare predictions with a teacher's, and those that look inside one.
DIVERGENCES = ("kl", "reverse_kl", "skewed_kl", "js")
INSIDE = ("hidden", "cosine", "relations")
#: What a preset fills in where the recipe says nothing.
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
    """Weights of the losses; what is left out is not used."""

    kl: float | None = Field(default=None, ge=0, description="KL(teacher ‖ student) of predictions (arXiv 1503.02531).")
    reverse_kl: float | None = Field(
        default=None, ge=0, description="KL(student ‖ teacher) (MiniLLM, arXiv 2306.08543)."
    )
    skewed_kl: float | None = Field(
        default=None, ge=0, description="KL(teacher ‖ `skew` · teacher + rest · student) (DistiLLM, arXiv 2402.03898)."
    )
    js: float | None = Field(default=None, ge=0, description="Jensen-Shannon divergence.")
    labels: float | None = Field(default=None, ge=0, description="Cross-entropy with the text itself, or with labels.")
    hidden: float | None = Field(
        default=None,
        ge=0,
        description="Squared distance of hidden states over the teacher's square, of the pairs in `layer_map`; projections are "
        "learned where widths differ, and thrown away (TinyBERT, arXiv 1909.10351).",
    )
    cosine: float | None = Field(
        default=None,
        ge=0,
        description="1 - cosine of the last hidden states (DistilBERT, arXiv 1910.01108), or of sentence embeddings.",
    )
    relations: float | None = Field(
        default=None,
        ge=0,
        description="KL of relations among queries, keys and values of one block (MiniLMv2, arXiv 2012.15828).",
    )

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.weights:
            raise ValueError("the weights of the losses sum to 0, so there is nothing to train for")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Those above 0, by name."""
        found = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: float(weight) for name, weight in found.items() if weight}


class TeacherEntry(Settings):
    """One teacher of several."""

    checkpoint: str = Field(min_length=1, description="`original`, a folder or a hub id.")
    weight: float = Field(
        default=1.0, gt=0, description="Its share in the mean of probabilities, relative to the others'."
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
    layers: int | None = Field(default=None, ge=1, description="How many blocks it has; all by default.")
    mlp: int | None = Field(default=None, ge=1, description="How many neurons its MLPs have.")
    heads: int | None = Field(
        default=None, ge=1, description="How many query heads its blocks have; groups go whole where need be."
    )
    hidden: int | None = Field(
        default=None, ge=1, description="How many hidden channels it has (families with RMSNorm)."
    )
    init: Literal["slice", "random"] = Field(
        default="slice",
        description="`slice`: weights of the checkpoint, of the units with the largest ones. `random`: fresh ones.",
    )


if TYPE_CHECKING:
    StudentSettings = _Student
else:
    # `from` is a word of Python's, and so no name that a class body can give a field
    StudentSettings = create_model(
        "StudentSettings",
        __base__=_Student,
        **{
            "from": (
                Literal["spread", "every_second", "first", "last"],
                Field(
                    default="spread",
                    description="Which blocks of the checkpoint it begins with: `spread` evenly from the first to the last, "
                    "`every_second` from the first on (DistilBERT), the `first` or the `last` ones.",
                ),
            )
        },
    )


class CacheSettings(Settings):
    """What teachers say, kept on disk."""

    folder: str = Field(min_length=1, description="Where; runs with the same teachers and samples share it.")
    top_k: int = Field(
        default=64, ge=1, le=4096, description="Likeliest tokens kept per token; all others are one bucket."
    )


def _cache(value: Any) -> Any:
    return {"folder": value} if isinstance(value, str) else value


class DistillSettings(PassSettings):
    """Settings of `distill`."""

    teacher: TeacherList = Field(
        default=(TeacherEntry(checkpoint="original"),),
        description="Who is learned from: `original` (what the run began with), a checkpoint, or a list of several, each with "
        "a weight, whose probabilities are averaged. Their tokenizer must be the student's.",
    )
    student: StudentSettings | None = Field(
        default=None,
        description="The student, cut from the checkpoint; by default the checkpoint as it is, with masks and ties kept.",
    )
    preset: Literal["recover", "from_scratch"] = Field(
        default="recover",
        description="Defaults for rate, schedule, optimizer and decay: `recover` what a pass before took away, or train a "
        "model `from_scratch`.",
    )
    losses: Losses | None = Field(
        default=None,
        description="Losses and their weights, by default `kl: 1`, and of base models `cosine: 1`.",
    )
    temperature: float = Field(
        default=1.0, gt=0, description="Divides logits before a divergence, which is times its square."
    )
    skew: float = Field(default=0.1, gt=0, lt=1, description="Share of the teacher that `skewed_kl` mixes in.")
    layer_map: tuple[tuple[int, int], ...] | None = Field(
        default=None,
        description="For `hidden`, pairs of outputs [student's, teacher's]: 0 the embeddings, 1 the first block. By default "
        "every block of the student with the one of the teacher at the same share of the depth.",
    )
    relation_layers: tuple[int, int] | None = Field(
        default=None,
        description="For `relations`, the pair of blocks [student's, teacher's], from 0; else the last.",
    )
    relation_heads: int = Field(default=8, ge=1, description="For `relations`, into how many heads vectors are split.")
    steps: int | None = Field(default=None, ge=1, description="Optimizer steps.")
    epochs: float | None = Field(
        default=None, gt=0, description="In place of `steps`: times through the training data."
    )
    tokens: int | None = Field(default=None, ge=1, description="In place of `steps`: training tokens, repeats counted.")
    batch_size: int = Field(default=16, ge=1, description="Samples of a step, over all processes.")
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="Samples of a process at a time, for less memory and the same result; all by default.",
    )
    learning_rate: float | None = Field(
        default_factory=_of_preset("learning_rate"),
        gt=0,
        description="Peak learning rate. By default 3e-3 from scratch; to recover 5e-4, less for fewer than 500 steps and for "
        "models wider than 256: times √(steps / 500) and times √(256 / width).",
    )
    schedule: Literal["cosine", "linear", "wsd", "constant"] = Field(
        default_factory=_of_preset("schedule"),
        description="How the rate falls; `cosine` to recover, else `wsd` (falls over the last 40 %).",
    )
    warmup_ratio: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Share of the steps over which the rate rises; by default a twentieth, and at least five steps where "
        "they are no more than a quarter.",
    )
    optimizer: Literal["adamw", "muon", "adafactor"] = Field(
        default_factory=_of_preset("optimizer"),
        description="`adamw` to recover, else `muon` (for matrices, one process); `adafactor` needs the least memory.",
    )
    weight_decay: float = Field(
        default_factory=_of_preset("weight_decay"), ge=0, description="Of matrices; 0 to recover, else 0.1."
    )
    dropout: bool = Field(
        default_factory=_of_preset("dropout"),
        description="Whether the student's dropout is on while it is trained; off to recover.",
    )
    max_grad_norm: float | None = Field(default=1.0, gt=0, description="Largest norm of the gradient.")
    autocast: Literal["bfloat16", "float16"] | None = Field(
        default=None, description="Narrow floats for matrix products; weights stay float32 while they are trained."
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Compute activations of blocks twice, to hold those of one at a time."
    )
    compile: bool = Field(default=False, description="Compile the student with torch.compile; needs a C++ compiler.")
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Keep a running mean (EMA) of the weights in their place: its decay, such as 0.99.",
    )
    validation_samples: int = Field(
        default=32, ge=1, description="Samples that are not trained on; the weights best on them are kept."
    )
    evaluate_every: int | None = Field(
        default=None,
        ge=1,
        description="Steps between looks at the held-out loss, where state is saved; a 20th of all, or more.",
    )
    patience: int | None = Field(default=None, ge=1, description="Looks without progress after which training stops.")
    teacher_cache: Annotated[CacheSettings, BeforeValidator(_cache)] | None = Field(
        default=None,
        description="Folder that keeps the teachers' predictions, or {folder, top_k}. What is there is not computed again.",
    )
    tensorboard: str | None = Field(default=None, min_length=1, description="Folder for TensorBoard logs.")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        lengths = [key for key in ("steps", "epochs", "tokens") if getattr(self, key) is not None]
        if len(lengths) > 1:
            raise ValueError(f"give one of `{lengths[0]}` and `{lengths[1]}`")
        if self.only or self.skip:
            raise ValueError("`only` and `skip` have no meaning here: all weights are trained")
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(f"`micro_batch_size` {self.micro_batch_size} is more than `batch_size` {self.batch_size}")
        if self.teacher_cache is not None and self.losses is not None:
            inside = [name for name in INSIDE if name in self.losses.weights]
            if inside:
                raise ValueError(f"`teacher_cache` keeps predictions alone: leave out the loss `{inside[0]}`")
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
                raise ValueError("`teacher_cache` keeps predictions, and no loss compares with a teacher's")
        return self

    def needs_teacher(self) -> bool:
        """Whether any loss compares with a teacher."""
        return self.losses is None or any(name != "labels" for name in self.losses.weights)
