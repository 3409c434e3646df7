"""Work of `share`, from headers: Hessians, shared matrices with residuals, arrangements that are compared. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compress.architectures.model_map import model_map
from compress.passes.share.groups import candidate_groups, is_open, shared_parts
from compress.passes.work import SampleSize, model_work, prediction_work, runner_work
from compress.spec.spec import Spec
from compress.work import Work

if TYPE_CHECKING:
    from compress.passes.share.settings import ShareSettings

#: Rounds of solving shared matrices and residuals, samples on which arrangements are compared, as the pass has them.
_ROUNDS, _HELD_OUT = 3, 16


def share_work(spec: Spec, settings: ShareSettings, size: SampleSize | None) -> Work | None:
    """Return the work; None for embeddings, codebooks and the Fisher information."""
    unknown = settings.embeddings is not None or settings.codebook_bits is not None or settings.init == "fisher"
    if size is None or unknown or settings.groups is None or not model_map(spec).known:
        return None
    parts = shared_parts(spec, settings)
    candidates = candidate_groups(spec, settings, parts)
    groups = list(candidates.values())
    tried = len(candidates) + (is_open(settings, candidates) and settings.arrangement == "best")
    blocks = sorted({i for some in groups for group in some for i in group})
    names = [name for i in blocks for part in parts if (name := model_map(spec).paths[i] + part) in _matrices(spec)]
    result = runner_work(spec, names, size, (), factor=None)
    result.add_all(_solving(spec, groups[0], parts, settings), tried)
    if tried > 1:
        held = SampleSize(min(_HELD_OUT, size.samples), size.length)
        result.add_all(model_work(spec, held, 2.0), tried)
        result.add_all(prediction_work(spec, 2.0 * held.tokens), tried)
    return result


def _matrices(spec: Spec) -> set[str]:
    return {x.name for x in model_map(spec).layers if len(x.tensor.shape) == 2}


def _solving(spec: Spec, groups: Sequence[Sequence[int]], parts: Sequence[str], settings: ShareSettings) -> Work:
    result, matrices, mapped = Work(), _matrices(spec), model_map(spec)
    rounds = _ROUNDS if settings.rank else 1
    for group in groups:
        for part in parts:
            name = mapped.paths[group[0]] + part
            if name not in matrices:
                continue
            x = mapped.linears[name]
            if settings.init == "least_squares":
                result.add("shared_matrix", x.O, x.I, rounds * len(group))
            if settings.rank:
                result.add("low_rank" if x.O <= x.I else "low_rank_tall", x.O, x.I, rounds * len(group))
            result.add("product", x.I, x.I, x.O * len(group))  # errors for the report
    return result
