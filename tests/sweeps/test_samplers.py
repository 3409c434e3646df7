"""Optuna's samplers: nothing twice, the same trials after a kill, gates count."""

from __future__ import annotations

import json

import pytest

from compress.errors import CompressError
from compress.recipe.search import load_search
from compress.sweeps import samplers
from compress.sweeps.study import Outcome


@pytest.fixture
def search(sweep, tmp_path):
    def make(sampler, **changes):
        mapping = sweep(tmp_path, sampler=sampler, **changes)
        mapping["passes"][0]["prune_unstructured"]["sparsity"] = {"search": ["30%", "70%"]}
        mapping["passes"][1]["cast"]["optional"] = True
        return load_search(mapping)

    return make


def continued(search, trials, count):
    """Trials of imagined outcomes: those with many bytes are beyond a gate."""
    trials = list(trials)
    while len(trials) < count and (trial := samplers.propose(search, trials)) is not None:
        values = [*trial.values.values()]
        sparsity, bits = float(values[0].rstrip("%")) / 100, {"int8": 8, "int4": 4, "int3": 3}.get(values[-1], 32)
        size = bits * (1 - sparsity)
        goals = {"size": (size,) * 3, "kl": (sparsity**2 + 1 / bits,) * 3}
        trial.parts["full"] = (
            Outcome("done", "passed", goals=goals) if size < 5 else Outcome("pruned", excess=size / 5 - 1)
        )
        trials.append(trial)
    return trials


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_sampler_repeats_nothing_and_goes_on_as_it_began(search, sampler):
    pytest.importorskip("optuna")
    made = search(sampler, trials=24)
    whole = continued(made, [], 24)
    assert len({json.dumps(trial.values) for trial in whole}) == len(whole) == 24
    assert [t.values for t in continued(made, whole[:9], 24)] == [t.values for t in whole]
    assert all(30 <= float(trial.values["passes.0.prune_unstructured.sparsity"].rstrip("%")) <= 70 for trial in whole)
    late = [trial.first.state for trial in whole[12:]]
    assert late.count("pruned") < late.count("done")
    assert continued(made, whole, 25) == whole


@pytest.mark.slow
def test_sampler_ends_when_every_choice_was_tried(sweep, tmp_path):
    pytest.importorskip("optuna")
    made = load_search(sweep(tmp_path, sampler="tpe", trials=30))
    assert len(continued(made, [], 30)) == 9


def test_sampler_that_is_not_installed_is_named(search, monkeypatch):
    monkeypatch.setattr(samplers, "find_spec", lambda name: None)
    with pytest.raises(
        CompressError, match=r"sweep.sampler: `tpe` needs Optuna; pip install 'compress-toolkit\[sweep\]'"
    ):
        samplers.check_sampler(search("tpe"))
