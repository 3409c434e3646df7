"""Values to search: how they are written, which are refused, which trials they make."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.cli.commands.recipes import check
from compress.errors import RecipeError
from compress.recipe import load_recipe
from compress.recipe.search import load_search
from compress.recipe.space import labels

TEXT = """\
model: {model}
output: out
data:
  calibration: {{files: [{train}]}}
  evaluation: {{files: [{valid}], window: 32}}
passes:
  - prune_structured: {{layers: 1, optional: true}}
  - prune_unstructured: {{sparsity: {{search: {{from: 40%, to: 60%, step: 10%}}}}}}
  - cast: {{weights: {{search: [int8, int4]}}}}
gates: {{agreement: {{min: 50%}}}}
sweep:
  minimize: [size, kl]
  subject_to: {{kl: {{max: 2}}}}
"""


@pytest.fixture
def path(tmp_path: Path, pico_llama: Path, texts: tuple[Path, Path]) -> Path:
    file = tmp_path / "sweep.yaml"
    file.write_text(TEXT.format(model=pico_llama, train=texts[0], valid=texts[1]))
    return file


def test_grid_has_every_combination_and_the_last_pass_varies_fastest(path):
    search = load_search(path)
    trials = list(search.grid())
    assert len(trials) == search.trials == 2 * 3 * 2
    assert [values["passes.2.cast.weights"] for values in trials[:4]] == ["int8", "int4", "int8", "int4"]
    assert search.mapping(trials[-1]) == {
        **{key: value for key, value in search.mapping(trials[0]).items() if key != "passes"},
        "passes": [{"prune_unstructured": {"sparsity": "60%"}}, {"cast": {"weights": "int4"}}],
    }
    assert search.mapping(trials[0])["gates"] == {"agreement": {"min": "50%"}, "kl": {"max": 2}}
    assert list(labels(search.space).values()) == ["prune_structured", "sparsity", "weights"]
    assert search.trial(trials[0]).passes[0].name == "prune_structured"


def test_values_inside_a_pass_that_is_left_out_make_no_trials(path):
    search = load_search(path, ["passes.1.prune_unstructured.optional=true", "passes.0=prune_structured: {layers: 1}"])
    assert search.trials == (1 + 3) * 2


def test_whole_passes_are_searched(path):
    search = load_search(
        path, ["passes.1={search: [{cast: {weights: bf16}}, {prune_unstructured: {pattern: 2:4}}, null]}"]
    )
    assert search.trials == 2 * 3 * 2
    assert [len(search.mapping(values)["passes"]) for values in list(search.grid())[:6]] == [3, 3, 3, 3, 2, 2]


WRONG = {
    "passes.1.prune_unstructured.sparsity={search: [40%, 70%]}": (
        "a grid tries every value, and from 40% to 70% there is no end of them",
        "write `{from: 40%, to: 70%, step: …}`, `{choices: [40%, 70%]}`, or `sampler: tpe`",
    ),
    "passes.1.prune_unstructured.sparsity={search: {from: 40%, to: 70}}": "all of them percentages",
    "passes.1.prune_unstructured.sparsity={search: {from: 40%, to: 130%, step: 45%}}": "got '130%'",
    "passes.2.cast.weights={search: [int4, int9]}": "got 'int9'",
    "passes.2.cast.wieghts={search: [1, 2, 3]}": "did you mean `weights`?",
    "passes.2.cast.weights={search: int4}": "expected what to search",
    "output={search: [a, b]}": "`output` is the same for all trials",
    "data.evaluation.window={search: [32, 64, 128]}": "`data.evaluation` is the same for all trials",
    "sweep.minimize=[size, agrement]": "nothing measures the goal `agrement`",
    "sweep.minimize=[agreement]": "agreement: higher is better",
    "sweep.minimize=[]": "a sweep needs a goal",
    "sweep.subject_to={kl: {min: 2}}": "unknown key `min` in sweep.subject_to.kl",
    "sweep.maximize=[accuracy]": "the goal accuracy is measured on text with labels",
    "data.evaluation=null": "the goal kl needs evaluation text, and there is no `data.evaluation`",
    "sweep.sampler=random": "expected grid, tpe or nsga2",
}


@pytest.mark.parametrize("change", WRONG)
def test_search_refuses(path, change):
    expected = WRONG[change]
    with pytest.raises(RecipeError) as caught:
        load_search(path, [change])
    for part in (expected,) if isinstance(expected, str) else expected:
        assert part in str(caught.value)


def test_both_ends_of_a_range_are_tried_by_the_settings_of_the_pass(path):
    with pytest.raises(RecipeError, match="expected a share between 0 and 1"):
        load_search(path, ["passes.1.prune_unstructured.sparsity={search: [40%, 130%]}", "sweep.sampler=tpe"])


def test_search_points_at_the_wrong_choice(path):
    path.write_text(path.read_text().replace("[int8, int4]", "[int8, int7]"))
    with pytest.raises(RecipeError) as caught:
        load_search(path)
    assert f"{path}:9:37" in str(caught.value)


def test_run_refuses_a_recipe_that_searches(path):
    with pytest.raises(RecipeError, match="run it with `compress sweep`"):
        load_recipe(path)


def test_sweep_refuses_a_recipe_that_does_not(path):
    text = path.read_text()
    path.write_text(text[: text.index("sweep:")])
    with pytest.raises(RecipeError, match="no section `sweep`"):
        load_search(path)
    with pytest.raises(RecipeError, match="nothing is searched"):
        load_search(
            {"model": "m/m", "output": "o", "passes": [{"cast": {"weights": "bf16"}}], "sweep": {"minimize": ["size"]}}
        )


def test_check_takes_a_sweep(path, capsys, monkeypatch):
    monkeypatch.chdir(path.parent)
    check([path], [], data=False, resolved=False, json=False, form=None)
    assert "no mistakes found" in capsys.readouterr().out
    path.write_text(path.read_text().replace("[int8, int4]", "[int8, int7]"))
    with pytest.raises(RecipeError, match="got 'int7'"):
        check([path], [], data=False, resolved=False, json=False, form=None)
