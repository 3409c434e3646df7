"""Sweeps: the front, the trials that share work, those that fail or need not run, what is kept."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
import time
from types import SimpleNamespace

import pytest

from compress.errors import CompressError, OutputError
from compress.pipeline.run import run
from compress.recipe import load_recipe
from compress.recipe.sweep import Proxy, Sweep
from compress.sweeps.figures import notes
from compress.sweeps.front import dominates, front
from compress.sweeps.run import join_sweep, run_sweep
from compress.sweeps.study import Outcome, SweepTrial
from compress.sweeps.worker import best, candidates
from tests.sweeps.conftest import in_process

BYTES = {"int8": 800, "int4": 400, "int3": 300}
LOSS = {"int8": 0.0, "int4": 0.02, "int3": 0.5}


def size(given):
    return round(BYTES[given["weights"]] * (1 - given["sparsity"]) + 10)


def kl(given):
    return given["sparsity"] ** 2 + LOSS[given["weights"]]


@pytest.fixture(scope="module")
def whole(sweep, imagined, tmp_path_factory):
    """A sweep that nothing disturbed: its document, its folder, and the trials in the order in which they ran."""
    folder, runner = tmp_path_factory.mktemp("whole"), imagined(size, kl)
    return run_sweep(sweep(folder), runner=runner), folder / "out.sweep", runner.recipes


def test_front_equals_brute_force_on_a_grid(whole):
    made, _, recipes = whole
    points = {
        (f"{round(100 * s)}%", w): (size({"sparsity": s, "weights": w}), kl({"sparsity": s, "weights": w}))
        for s, w in itertools.product((0.3, 0.5, 0.7), BYTES)
    }
    expected = {
        key
        for key, (bytes_, loss) in points.items()
        if not any(b <= bytes_ and k <= loss and (b, k) != (bytes_, loss) for b, k in points.values())
    }
    assert {tuple(trial["values"].values()) for trial in made["trials"] if trial["front"]} == expected
    assert len(recipes) == 9
    sizes = [made["trials"][number - 1]["goals"]["size"][0] for number in made["front"]]
    assert sizes == sorted(sizes)
    assert (made["status"], made["exit_status"]) == ("passed", 0)


def test_sweep_keeps_the_checkpoints_of_the_front_alone(whole):
    made, folder, _ = whole
    assert {int(path.parent.name) for path in (folder / "trials").glob("*/model")} == set(made["front"])
    assert len(list((folder / "trials").glob("*/report.json"))) == 9
    recipes = sorted((folder / "front").glob("*.yaml"))
    assert [load_recipe(path).output for path in recipes] == [
        str(folder / f"trials/{number:04d}/model") for number in made["front"]
    ]
    assert json.loads((folder / "sweep.json").read_text()) == made
    page = (folder / "sweep.html").read_text()
    assert "<svg" in page
    assert "http" not in page.replace("http-equiv", "")


def test_second_run_does_nothing_and_more_trials_go_on(sweep, imagined, tmp_path):
    first = run_sweep(sweep(tmp_path, trials=4), runner=imagined(size, kl))
    again = imagined(size, kl)
    assert run_sweep(sweep(tmp_path, trials=4), runner=again) == first
    assert again.recipes == []
    assert len(run_sweep(sweep(tmp_path, trials=6), runner=again)["trials"]) == 6
    assert len(again.recipes) == 2


@pytest.mark.slow
def test_failing_trial_does_not_end_a_sweep(sweep, imagined, tmp_path):
    runner = imagined(size, kl)

    def failing(recipe, **options):
        if "int4" in recipe.read_text():
            options["log"].write_text("compress: no memory is left for this\n")
            return 4
        return runner(recipe, **options)

    made = run_sweep(sweep(tmp_path), runner=failing)
    failed = [trial for trial in made["trials"] if trial["state"] == "failed"]
    assert {trial["values"]["passes.1.cast.weights"] for trial in failed} == {"int4"}
    assert {trial["message"] for trial in failed} == {"no memory is left for this"}
    assert made["front"]


def test_trial_that_failed_for_lack_of_memory_is_tried_again(sweep, imagined, tmp_path):
    runner, lacking = imagined(size, kl), imagined(size, kl)

    def full(recipe, **options):
        return 4 if "int4" in recipe.read_text() else 2 if "int3" in recipe.read_text() else lacking(recipe, **options)

    made = run_sweep(sweep(tmp_path), runner=full)
    assert [trial["lack"] for trial in made["trials"]] == [False, True, False] * 3
    assert "3 trials failed for lack of memory or disk, or by a kill; the same command tries again" in notes(made)
    again = run_sweep(sweep(tmp_path), runner=runner)
    assert [given["weights"] for given in runner.recipes] == ["int4"] * 3
    assert [trial["state"] for trial in again["trials"]] == ["done", "done", "failed"] * 3


def test_first_trials_that_fail_alike_end_a_sweep(sweep, imagined, tmp_path):
    runner = imagined(size, kl)

    def failing(recipe, **options):
        options["log"].write_text(f"compress: {recipe.parent.name}: no text\n")
        time.sleep(0.1)
        return 2

    with pytest.raises(CompressError, match="the first 3 trials failed: 0001: no text; the same command tries them"):
        run_sweep(sweep(tmp_path), runner=failing)
    assert {trial["state"] for trial in run_sweep(sweep(tmp_path), runner=runner)["trials"]} == {"done"}
    assert len(runner.recipes) == 9


def test_notes_name_a_gate_that_does_not_decide(whole):
    made = copy.deepcopy(whole[0])
    gate = {"gate": "kl.max", "verdict": "inconclusive", "text": "0.1 ≤ 0.1?"}
    made["front"], made["trials"][2]["verdict"], made["trials"][2]["gates"] = [], "inconclusive", [gate]
    assert notes(made)[0] == "inconclusive: trial 3 (sparsity 30%, weights int3): kl.max 0.1 ≤ 0.1?"


def test_sweep_without_any_trial_that_ends(sweep, imagined, tmp_path):
    made = run_sweep(sweep(tmp_path, trials=1), runner=lambda recipe, **options: -9)
    assert made["trials"][0]["message"] == "ended by signal 9; often a lack of memory"
    assert (made["status"], made["exit_status"]) == ("every trial failed", 2)


def test_trial_whose_planned_bytes_break_a_gate_never_runs(sweep, imagined, tmp_path):
    runner = imagined(size, kl)
    made = run_sweep(sweep(tmp_path / "none", subject_to={"size": {"max": 1000}}), runner=runner)
    assert runner.recipes == []
    assert (made["status"], made["exit_status"]) == ("failed", 1)
    by_size = sorted(made["trials"], key=lambda trial: trial["planned"]["size"])
    assert notes(made)[0].startswith(f"nearest: trial {by_size[0]['number']} (")
    most = int(by_size[2]["planned"]["size"])
    some = run_sweep(sweep(tmp_path / "some", subject_to={"size": {"max": most}}), runner=runner)
    assert {t["number"] for t in some["trials"] if t["state"] == "done"} == {t["number"] for t in by_size[:3]}
    assert some["trials"][by_size[3]["number"] - 1]["message"].startswith("by its plan size.max fails")


def test_trial_that_another_beats_by_plan_never_runs(sweep, imagined, tmp_path):
    runner = imagined(size, kl)
    made = run_sweep(sweep(tmp_path, minimize=["size"]), runner=runner)
    assert len(made["front"]) == 1
    smallest = min(made["trials"], key=lambda trial: trial["planned"]["size"])
    assert made["trials"][0]["state"] == "done"
    assert smallest["state"] in ("done", "pruned")
    assert len(runner.recipes) < 9


def test_only_the_front_of_the_proxy_is_evaluated_in_full(sweep, imagined, tmp_path):
    runner = imagined(size, kl)
    made = run_sweep(sweep(tmp_path, proxy={"max_documents": 2}), runner=runner)
    full = [trial["number"] for trial in made["trials"] if trial["part"] == "full"]
    assert sorted(full) == sorted(made["front"])
    assert len(runner.recipes) == 9 + len(full)


def test_trial_that_fails_in_full_leaves_its_place_to_the_next():
    sweep = Sweep(minimize=("size", "kl"), proxy=Proxy(max_documents=2))
    study = SimpleNamespace(search=SimpleNamespace(sweep=sweep), first_part="proxy")

    def trial(number, bytes_, loss):
        goals = {"size": (bytes_,) * 3, "kl": (loss,) * 3}
        return SweepTrial(number, {}, parts={"proxy": Outcome("done", "inconclusive", goals=goals)})

    trials = [trial(1, 1, 0.5), trial(2, 2, 0.5), trial(3, 3, 0.1)]
    assert [t.number for t in candidates(study, trials)] == [1, 3]
    trials[0].parts["full"] = Outcome("done", "failed", goals=trials[0].first.goals)
    trials[2].parts["full"] = Outcome("done", "passed", goals=trials[2].first.goals)
    assert [t.number for t in candidates(study, trials)] == [2, 3]
    assert [t.number for t in best(study, trials)] == [3]


def test_study_of_another_recipe_is_refused(sweep, imagined, tmp_path):
    run_sweep(sweep(tmp_path, trials=1), runner=imagined(size, kl))
    with pytest.raises(OutputError, match=r"out.sweep: holds the sweep of another recipe: `sweep` differ"):
        run_sweep(sweep(tmp_path, minimize=["size"]), runner=imagined(size, kl))


def test_folder_of_somebody_else_is_refused(sweep, tmp_path):
    (tmp_path / "out.sweep").mkdir()
    (tmp_path / "out.sweep/photo").touch()
    with pytest.raises(OutputError, match="exists and is no sweep"):
        run_sweep(sweep(tmp_path))


def test_copy_of_a_sweep_cannot_be_joined(sweep, imagined, tmp_path):
    run_sweep(sweep(tmp_path, trials=1), runner=imagined(size, kl))
    assert join_sweep(tmp_path / "out.sweep", runner=imagined(size, kl))["front"] == [1]
    shutil.copytree(tmp_path / "out.sweep", tmp_path / "copy.sweep")
    with pytest.raises(
        CompressError, match=r"copy.sweep: is not the folder in which .* began the sweep .*, but a copy"
    ):
        join_sweep(tmp_path / "copy.sweep")
    with pytest.raises(CompressError, match="is not the folder of a sweep"):
        join_sweep(tmp_path)


def test_lost_trial_is_run_again_and_nothing_else(sweep, imagined, tmp_path, whole):
    expected, _, recipes = whole
    runner = imagined(size, kl)

    def killed(recipe, **options):
        if len(runner.recipes) == 4:
            raise KeyboardInterrupt  # the journal has its beginning alone, as after a kill
        return runner(recipe, **options)

    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep(tmp_path), runner=killed)
    with (tmp_path / "out.sweep/journal.jsonl").open("ab") as file:
        file.write(b'{"event": "ended", "trial": 5, "pa')  # torn
    made = run_sweep(sweep(tmp_path), runner=runner)
    assert runner.recipes == recipes
    assert made["front"] == expected["front"]
    assert [trial["goals"] for trial in made["trials"]] == [trial["goals"] for trial in expected["trials"]]


def test_front_of_equal_points_has_the_first():
    assert front([(1, 2), (1, 2), (2, 1), (3, 3)]) == [0, 2]
    assert dominates((1, 1), (1, 2))
    assert not dominates((1, 2), (1, 2))


def test_earlier_passes_run_once_for_all_settings_of_the_last(sweep, tmp_path):
    mapping = sweep(tmp_path)
    mapping["passes"][0]["prune_unstructured"]["sparsity"] = "50%"
    made = run_sweep(mapping, runner=in_process)
    assert [trial["reused"] for trial in made["trials"]] == [0, 1, 1]
    assert all(trial["state"] == "done" for trial in made["trials"])
    first = [
        json.loads(path.read_text())["stages"][0]
        for path in sorted((tmp_path / "out.sweep/trials").glob("*/report.json"))
    ]
    assert len({stage["content"] for stage in first}) == 1
    assert not list((tmp_path / "out.sweep").rglob("stages"))
    assert run(load_recipe(next((tmp_path / "out.sweep/front").iterdir()))).nothing_to_do
