"""The ``sweep`` section of a recipe: goals, bounds and how many trials. `space` reads the values to search."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from compress.evaluation import metrics
from compress.recipe.gates import Gates
from compress.recipe.suggest import choices
from compress.settings import ByteSize, Settings

#: Goals that are no metric: the files, and the ratios of speed and memory to the original's.
_OTHERS = ("size", "parameters", "prefill", "decode", "memory")
#: Every goal of a sweep.
GOALS: tuple[str, ...] = (*_OTHERS, *metrics.table())


def lower_is_better(goal: str) -> bool:
    """Whether a goal is met by low values."""
    return goal in _OTHERS or metrics.table()[goal].lower


def _goals(lower: bool) -> AfterValidator:
    def checked(names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in GOALS:
                raise PydanticCustomError(
                    "goal",
                    "nothing measures the goal `{name}`",
                    {"name": name, "hint": choices(name, GOALS, "gates") or f"goals: {', '.join(GOALS)}"},
                )
            if lower_is_better(name) is not lower:
                right, better = ("minimize", "lower") if not lower else ("maximize", "higher")
                raise PydanticCustomError(
                    "goal", "{name}: {better} is better", {"name": name, "better": better, "hint": f"write `{right}`"}
                )
            if names.count(name) > 1:
                raise PydanticCustomError("goal", "`{name}` is named twice", {"name": name})
        return names

    return AfterValidator(checked)


def _named(lower: bool) -> WithJsonSchema:
    names = [name for name in GOALS if lower_is_better(name) is lower]
    return WithJsonSchema({"type": "array", "items": {"enum": names}})


class Proxy(Settings):
    """A smaller evaluation for every trial; the trials of its front are then evaluated in full."""

    max_documents: int = Field(ge=1, description="Documents of `data.evaluation` that every trial is evaluated on.")


class Sweep(Settings):
    """A search over the values that the recipe gives as `{search: …}`."""

    minimize: Annotated[tuple[str, ...], _goals(True), _named(True)] = Field(
        default=(), description="Goals of which less is better, such as `[size, kl]`."
    )
    maximize: Annotated[tuple[str, ...], _goals(False), _named(False)] = Field(
        default=(), description="Goals of which more is better, such as `[agreement]`."
    )
    subject_to: Gates = Field(
        default=Gates(), description="Gates that a trial must pass to be on the front, beside those of `gates`."
    )
    sampler: Literal["grid", "tpe", "nsga2"] = Field(
        default="grid",
        description="`grid`: every combination. `tpe`, `nsga2`: the next trial follows from the earlier ones; they need "
        "`compress-toolkit[sweep]`.",
    )
    trials: int | None = Field(
        default=None, ge=1, description="Most trials. By default all of a grid, and 32 of other samplers."
    )
    proxy: Proxy | None = Field(
        default=None, description="Evaluate every trial on fewer documents, and only the front in full."
    )
    keep: Literal["front", "all"] = Field(
        default="front", description="The trials whose checkpoints are kept; reports of all are kept."
    )
    max_disk: ByteSize | None = Field(
        default=None,
        description="Most bytes of the stages that trials share, such as 20GB. By default four times the original.",
    )

    @model_validator(mode="after")
    def _has_goal(self) -> Self:
        if not self.goals:
            raise ValueError("a sweep needs a goal: `minimize` or `maximize`")
        return self

    @property
    def goals(self) -> tuple[str, ...]:
        """All goals, those to minimise first."""
        return (*self.minimize, *self.maximize)
