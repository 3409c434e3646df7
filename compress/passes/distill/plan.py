"""Plan of `distill`: losses, compared layers, the student's shape, default rates, checks of teachers. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from compress.architectures import resize
from compress.architectures.model_map import model_map
from compress.checkpoint.edits.linformer import PROJECTIONS
from compress.errors import PassError
from compress.evaluation.tasks import EMBEDDING, is_seq2seq, label_ids, task_of
from compress.passes.distill.settings import DIVERGENCES, DistillSettings
from compress.passes.prune_structured.settings import PruneStructuredSettings
from compress.spec.spec import Spec

#: Peak rate for at least this number of steps, and at most this width.
RATE, RATE_STEPS, RATE_WIDTH = 5e-4, 500, 256
#: Fewest training samples per held-out sample, so that validation takes little of the time.
_LOOKED = 4


def check_losses(spec: Spec, settings: DistillSettings) -> None:
    """Raise `PassError` if the model's task lacks one of the losses."""
    task = task_of(spec.structure.class_name)
    if task.labels and settings.teacher_cache is not None:
        raise PassError(
            "`teacher_cache` keeps predictions of tokens, which this model does not make", key="teacher_cache"
        )
    weights = losses(spec, settings)
    of_logits = [name for name in (*DIVERGENCES, "labels") if name in weights]
    if is_seq2seq(spec.structure):
        _check_seq2seq(spec, settings, [name for name in weights if name not in of_logits])
    if task is EMBEDDING and of_logits:
        raise PassError(
            f"`{of_logits[0]}` compares predictions, and {spec.structure.class_name or 'a base model'} makes none",
            key="losses",
            fix="use `cosine`, `hidden` or `relations`",
        )
    if task.labels == "classes" and "cosine" in weights:
        raise PassError("`cosine` is for language models and sentence embeddings", key="losses", fix="use `hidden`")


def _check_seq2seq(spec: Spec, settings: DistillSettings, of_states: list[str]) -> None:
    """Raise `PassError` if an encoder-decoder is to be compared by what only models with one list of blocks have."""
    model = spec.structure.class_name
    if settings.teacher_cache is not None:
        raise PassError(f"`teacher_cache` keeps predictions of one text, and {model} reads two", key="teacher_cache")
    if of_states:
        raise PassError(
            f"`{of_states[0]}` compares states of blocks, and those of {model} are in two lists",
            key="losses",
            fix="use `kl` or `labels`",
        )


def _in_matrices(spec: Spec, attention: bool) -> int:
    """Parameters in matrices. A conversion may add others: logits of sinks, projections along the text, routers to experts.

    Args:
        attention: count those of attention too.
    """
    mapped = model_map(spec)
    added = {f"{edit.module}.{part}" for edit in spec.structure.edits for part in PROJECTIONS}
    left_out = {"router"} if attention else {"router", "attention"}
    names = {name for name, x in mapped.linears.items() if x.role not in left_out} - added
    return sum(t.count for t in spec.weights() if t.is_float and t.name in names)


def _cache(spec: Spec) -> str | None:
    mapped = model_map(spec)
    return mapped.record.cache if mapped.known else None


def check_teacher(student: Spec, teacher: Spec, name: str) -> None:
    """Raise `PassError` unless a teacher has the student's task and labels, and at least its size."""
    mine, theirs = (task_of(spec.structure.class_name) for spec in (student, teacher))
    if theirs is not mine:
        raise PassError(f"the teacher {name} is for {theirs.name}, the student for {mine.name}", key="teacher")
    alike = _cache(student) == _cache(teacher)  # latent attention caches less with larger matrices
    if _in_matrices(teacher, alike) < _in_matrices(student, alike):
        raise PassError(
            f"the student has {student.parameters:,} parameters, more than the teacher {name}: {teacher.parameters:,}",
            key="teacher",
            fix="take a larger teacher, or make the student smaller",
        )
    if mine.labels == "classes":
        ours, others = (label_ids(spec.structure.config)[0] for spec in (student, teacher))
        if ours != others:
            raise PassError(f"the teacher {name} has the labels {others}, the student {ours}", key="teacher")


def check_cache(settings: DistillSettings, vocabulary: int) -> None:
    """Raise `PassError` if a teacher cache would hold the whole vocabulary."""
    if settings.teacher_cache is not None and settings.teacher_cache.top_k >= vocabulary:
        raise PassError(
            f"top_k of {settings.teacher_cache.top_k} is not below the vocabulary of {vocabulary}", key="teacher_cache"
        )


def pairs_inside(
    student: Spec, teacher: Spec | None, settings: DistillSettings
) -> tuple[tuple[tuple[int, int], ...], tuple[int, int] | None]:
    """Pairs (student, teacher) of outputs that ``hidden`` compares, and the pair of blocks that ``relations`` compares.

    Args:
        teacher: the first teacher; None if it is not known yet, and then assumed to be as deep as the settings need.

    Raises:
        PassError: a block or head is out of range.
    """
    weights, mine = losses(student, settings), model_map(student).depth
    theirs = mine if teacher is None else model_map(teacher).depth
    known = teacher is not None
    states: tuple[tuple[int, int], ...] = ()
    vectors = None
    if "hidden" in weights:
        states = settings.layer_map or tuple((i, round(i * theirs / mine)) for i in range(mine + 1))
        for pair in states:
            if not (0 <= pair[0] <= mine and pair[1] >= 0 and (pair[1] <= theirs or not known)):
                raise PassError(
                    f"{list(pair)} is out of range: the student's outputs are 0 to {mine}"
                    + f", the teacher's 0 to {theirs}" * known,
                    key="layer_map",
                )
    if "relations" in weights:
        vectors = settings.relation_layers or (mine - 1, theirs - 1)
        if not (0 <= vectors[0] < mine and vectors[1] >= 0 and (vectors[1] < theirs or not known)):
            raise PassError(
                f"{list(vectors)} is out of range: the student has {mine} blocks" + f", the teacher {theirs}" * known,
                key="relation_layers",
            )
        for spec in (student, *([teacher] if teacher is not None else [])):
            _check_heads(spec, settings.relation_heads)
    return states, vectors


def _check_heads(spec: Spec, heads: int) -> None:
    if (width := model_map(spec).kv_heads * model_map(spec).head_dim) % heads:
        raise PassError(
            f"vectors of {width} entries do not split into {heads} heads",
            key="relation_heads",
            fix=f"set relation_heads to a divisor of {width}, such as {math.gcd(width, heads)}",
        )


def default_rate(steps: int, width: int) -> float:
    """Peak rate of AdamW; measured: the held-out loss of a repaired student falls from the first steps on."""
    return RATE * min(1.0, math.sqrt(steps / RATE_STEPS)) * min(1.0, math.sqrt(RATE_WIDTH / width))


def default_warmup(steps: int) -> float:
    """Share of the steps with a rising rate, since Adam's first steps are as large as its rate."""
    return max(0.05, min(0.25, 5 / steps))


def evaluate_every(settings: DistillSettings, steps: int) -> int:
    """Steps between validations; by default so many that these take little of the time."""
    least = _LOOKED * settings.validation_samples // settings.batch_size
    return settings.evaluate_every or max(1, steps // 20, least)


def unhelped(name: str, training: Mapping[str, Any]) -> str | None:
    """Sentence for the report if training did not lower the held-out loss; None if it did."""
    if training.get("helped", True):
        return None
    first, *others = training["held_out"]
    best = min(others, key=lambda row: row["loss"])
    return (
        f"{name} did not help: the held-out loss was {first['loss']:.4g} before training and at best {best['loss']:.4g} "
        f"after it (step {best['step']}), so the weights stay as they were"
    )


def bytes_per_token(k: int, vocabulary: int) -> int:
    """Bytes per token of a teacher cache: k ids, and k + 1 log-probabilities in half precision."""
    return k * (2 if vocabulary <= 1 << 16 else 4) + 2 * (k + 1)


def losses(spec: Spec, settings: DistillSettings) -> dict[str, float]:
    """Losses with their weights; by default those of the model's task."""
    if settings.losses is not None:
        return settings.losses.weights
    return {"cosine": 1.0} if task_of(spec.structure.class_name) is EMBEDDING else {"kl": 1.0}


def student_cut(spec: Spec, settings: DistillSettings) -> PruneStructuredSettings | None:
    """Settings of `prune_structured` that leave the student; None if nothing is removed. Raises `PassError`."""
    asked = settings.student
    assert asked is not None
    mapped = model_map(spec)
    depth = mapped.depth
    gone: dict[str, Any] = {}
    if asked.layers is not None and asked.layers != depth:
        kept = kept_blocks(depth, asked.layers, getattr(asked, "from"))
        gone["layers"] = tuple(i for i in range(depth) if i not in kept)
    sizes: dict[str, int | None] = {
        "heads": mapped.heads,
        "hidden": mapped.hidden,
        "mlp": mlp_neurons(spec),
    }
    for key, size in sizes.items():
        wanted = getattr(asked, key)
        if wanted is None or wanted == size:
            continue
        if size is None or wanted > size:
            raise PassError(
                f"the student would have {wanted} {key}, the checkpoint has {size or 'none'}", key="student"
            )
        gone[key] = size - wanted
    if not gone:
        if asked.init == "random":
            return None
        raise PassError(
            "the student is the checkpoint itself", key="student", fix="leave `student` out, or make it smaller"
        )
    return PruneStructuredSettings(importance="magnitude", compensation="none", **gone)


def mlp_neurons(spec: Spec) -> int | None:
    """Neurons of the widest MLP; None without an MLP."""
    units = resize.mlp_units(spec)
    return max((one.count for mlps in units.values() for one in mlps), default=None)


def kept_blocks(depth: int, layers: int, begin: str) -> list[int]:
    """Indices of the blocks that a student of ``layers`` blocks keeps. Raises `PassError`."""
    if layers > depth:
        raise PassError(f"the student would have {layers} blocks, the checkpoint has {depth}", key="student")
    if begin == "first":
        return list(range(layers))
    if begin == "last":
        return list(range(depth - layers, depth))
    if begin == "every_second":
        if layers != math.ceil(depth / 2):
            raise PassError(
                f"every second of {depth} blocks makes {math.ceil(depth / 2)}, not {layers}",
                key="student",
                fix="use `from: spread`",
            )
        return list(range(0, depth, 2))
    if layers == 1:
        return [0]
    return [round(i * (depth - 1) / (layers - 1)) for i in range(layers)]
