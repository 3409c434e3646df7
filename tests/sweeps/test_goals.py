"""Goals that are tasks of lm-eval: named, measured with intervals, refused."""

from __future__ import annotations

import json

import pytest

from compress.errors import CompressError, RecipeError
from compress.evaluation.benchmarks import task_change
from compress.evaluation.metrics.base import Resampling
from compress.recipe.search import load_search
from compress.recipe.sweep import Sweep, task_of_goal
from compress.sweeps import goals
from compress.sweeps.study import SweepTrial
from compress.sweeps.trials import TrialRuns

SHORT = Resampling(bootstrap=100)


def task(values, *, metric="acc", higher=True):
    rows = [{"id": i, "hash": f"h{i}", metric: value} for i, value in enumerate(values)]
    mean = sum(values) / len(values)
    return {"version": "1", "shots": 0, "metrics": {metric: mean}, "higher": {metric: higher}, "rows": rows}


def report(before, after):
    resolved = {"confidence": SHORT.confidence, "bootstrap": SHORT.bootstrap, "seed": SHORT.seed}
    sides = {
        side: {"lm_eval": {"version": "0", "tasks": {"arc.easy": one}}, "evaluation": None}
        for side, one in (("original", before), ("result", after))
    }
    return {"recipe": {"resolved": resolved}, **sides}


def test_interval_of_a_task_is_that_of_the_paired_difference():
    before, after = task([1.0] * 30 + [0.0] * 10), task([1.0] * 26 + [0.0] * 14)
    sweep = Sweep(maximize=("lm_eval.arc.easy.acc", "lm_eval.arc.easy"))
    drop = task_change(before, after, "acc", SHORT)
    made = goals.measured(report(before, after), sweep)
    expected = (0.65, 0.75 - drop.upper / 100, 0.75 - drop.lower / 100)
    assert made == dict.fromkeys(sweep.goals, pytest.approx(expected, rel=1e-12))
    assert goals.losses(made, sweep) == [-0.65, -0.65]
    before, after = (task([x + i for i in range(9)], metric="loss", higher=False) for x in (2.0, 3.0))
    (bounds,) = goals.measured(report(before, after), Sweep(minimize=("lm_eval.arc.easy",))).values()
    assert bounds == pytest.approx((7, 7, 7), rel=1e-12)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"minimize": ["lm_eval.arc.easy.acc"]},
            "goal lm_eval.arc.easy.acc: of acc more is better; write it in `maximize`",
        ),
        ({"maximize": ["lm_eval.boolq"]}, "the goal lm_eval.boolq: lm-eval has measured arc.easy; name one of them"),
        ({"maximize": ["lm_eval.arc.easy.f1"]}, "needs the metric f1; the task has acc"),
    ],
)
def test_goal_that_lm_eval_does_not_measure_ends_the_sweep(section, message):
    sides = report(task([1.0] * 9), task([1.0] * 9))
    with pytest.raises(CompressError, match=message):
        goals.measured(sides, Sweep(**{key: tuple(names) for key, names in section.items()}))


def test_names_of_tasks_may_hold_dots():
    assert task_of_goal("lm_eval.a.b", ["a.b"]) == ("a.b", None)
    assert task_of_goal("lm_eval.a.b", ["a"]) == ("a", "b")


@pytest.fixture
def with_tasks(sweep, tmp_path):
    def make(**changes):
        mapping = sweep(tmp_path, **changes)
        tasks = {"lm_eval": {"tasks": ["arc_easy"], "limit": 500}}
        return {**mapping, "evaluate": ["kl", {"repetition": {"distances": [16]}}, tasks]}

    return make


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"maximize": ["lm_eval.arc_hard"]},
            "the goal lm_eval.arc_hard needs the task arc_hard, which is not measured",
        ),
        ({"maximize": ["lm_eval"]}, "name the task: `lm_eval.arc_easy`"),
        (
            {"minimize": ["lm_eval.arc_easy"], "maximize": ["lm_eval.arc_easy"]},
            "is named in `minimize` and in `maximize`",
        ),
    ],
)
def test_goal_on_a_task_is_refused(with_tasks, changes, message):
    with pytest.raises(RecipeError) as caught:
        load_search(with_tasks(**changes))
    assert message in str(caught.value)


def test_proxy_evaluates_goals_and_gates_alone_with_their_settings(with_tasks, tmp_path):
    mapping = with_tasks(
        minimize=["size"], maximize=["lm_eval.arc_easy"], proxy={"max_documents": 4}, subject_to={"kl": {"max": 1}}
    )
    mapping["data"]["evaluation"] = "default"
    search = load_search(mapping)

    class Study:
        path = folder = tmp_path

        def place(self, trial):
            return tmp_path / trial.name

    study = Study()
    study.search = search
    made = TrialRuns(study).mapping(SweepTrial(1, next(search.grid())), "proxy")
    assert json.loads(json.dumps(made["evaluate"])) == ["kl", {"lm_eval": {"tasks": ["arc_easy"], "limit": 4}}]
    assert made["data"]["evaluation"]["max_documents"] == 4
