"""The ``sweep`` section of a recipe: goals, bounds and how many trials. `space` reads the values to search."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from compress.evaluation import metrics
from compress.recipe.gates import Gates, metric_of
from compress.recipe.suggest import choices
from compress.settings import ByteSize, Settings

#: Goals that are no metric: the files, and the ratios of speed and memory to the original's.
_OTHERS = ("size", "parameters", "prefill", "decode", "memory")
#: Every goal of a sweep, beside tasks of lm-eval.
GOALS: tuple[str, ...] = (*_OTHERS, *metrics.table())
#: Keys of goals.
DIRECTIONS = ("minimize", "maximize")
#: Beginning of the goals that are tasks of lm-eval: ``lm_eval.TASK``, or ``lm_eval.TASK.METRIC``.
OF_TASKS = "lm_eval."


def metric_of_goal(goal: str) -> str | None:
    """The metric that a goal reads; None where the files are enough."""
    return metric_of(goal.partition(".")[0])


def task_of_goal(goal: str, tasks: Collection[str]) -> tuple[str, str | None]:
    """The task of lm-eval that a goal names, and its metric; None for the task's first. Names may hold dots.

    Args:
        tasks: the tasks that are known.
    """
    name = goal.removeprefix(OF_TASKS)
    task, dot, metric = name.rpartition(".")
    return (name, None) if name in tasks or not dot else (task, metric)


def _is_low(goal: str) -> bool:
    """Whether a goal that is no task of lm-eval is met by low values."""
    return goal in _OTHERS or metrics.table()[goal].lower


def _goals(lower: bool) -> AfterValidator:
    def checked(names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            task = name.startswith(OF_TASKS) and name != OF_TASKS
            if not task and name not in GOALS:
                raise PydanticCustomError(
                    "goal",
                    "nothing measures the goal `{name}`",
                    {"name": name, "hint": _meant(name)},
                )
            if not task and _is_low(name) is not lower:
                right, better = ("minimize", "lower") if not lower else ("maximize", "higher")
                raise PydanticCustomError(
                    "goal", "{name}: {better} is better", {"name": name, "better": better, "hint": f"write `{right}`"}
                )
            if names.count(name) > 1:
                raise PydanticCustomError("goal", "`{name}` is named twice", {"name": name})
        return names

    return AfterValidator(checked)


def _meant(name: str) -> str:
    """A hint for the name of a goal that nothing measures."""
    if name in ("lm_eval", OF_TASKS):
        return "name the task: `lm_eval.arc_easy`, or also its metric: `lm_eval.arc_easy.acc_norm`"
    return choices(name, GOALS, "gates") or f"goals: {', '.join(GOALS)}, {OF_TASKS}TASK"


def _named(lower: bool) -> WithJsonSchema:
    names = [name for name in GOALS if _is_low(name) is lower]
    task = {"type": "string", "pattern": "^lm_eval\\..+$"}
    return WithJsonSchema({"type": "array", "items": {"anyOf": [{"enum": names}, task]}})


class Proxy(Settings):
    """A smaller evaluation for every trial; the trials of its front are then evaluated in full."""

    max_documents: int = Field(ge=1, description="Documents of `data.evaluation` that every trial is evaluated on.")


class Sweep(Settings):
    """A search over the values that the recipe gives as `{search: …}`."""

    minimize: Annotated[tuple[str, ...], _goals(True), _named(True)] = Field(
        default=(),
        description="Goals of which less is better, such as `[size, kl]`. Those of lm-eval are `lm_eval.TASK` or "
        "`lm_eval.TASK.METRIC`.",
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
        if both := set(self.minimize) & set(self.maximize):
            raise ValueError(f"`{min(both)}` is named in `minimize` and in `maximize`")
        return self

    @property
    def goals(self) -> tuple[str, ...]:
        """All goals, those to minimise first."""
        return (*self.minimize, *self.maximize)

    def lower(self, goal: str) -> bool:
        """Whether a goal is met by low values."""
        return goal in self.minimize
