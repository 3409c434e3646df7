"""The work of `distill`: models, data and the loop come together here. Imports torch."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from compress import architectures
from compress.architectures import narrowing
from compress.calibration.ranks import Ranks
from compress.checkpoint.edits import shared_parameters
from compress.checkpoint.open import Checkpoint, Derived, Value, open_checkpoint, torch_dtype
from compress.checkpoint.structure import to_json
from compress.checkpoint.write import render_config
from compress.errors import DataError, PassError
from compress.evaluation.embeddings import Pooling, read_pooling
from compress.loading import (
    load_checkpoint,
    load_tokenizer,
    quiet_transformers,
    stock_class,
)
from compress.passes.base import Context
from compress.passes.distill import losses, task_name
from compress.passes.distill_settings import DistillSettings
from compress.passes.teachers import (
    begins_on,
    blocks_of,
    check_reader,
    open_teachers,
    shared_vocabulary,
    teachers_say,
)
from compress.training.data import Masking, Samples
from compress.training.loop import How, Training
from compress.training.objective import Objective, Terms
from compress.training.optimize import Update
from compress.training.sharding import like, shard, whole
from compress.training.state import RunState

if TYPE_CHECKING:
    from compress.calibration.batches import Batches

#: Samples trained on for each held-out one, at least, so that looking at these takes little of the time.
_LOOKED = 4


def distill(student: Checkpoint, settings: DistillSettings, context: Context) -> Checkpoint:
    """The student checkpoint, trained as the settings say."""
    ranks = Ranks(context.rank, context.world)
    if context.world > 1 and settings.optimizer != "adamw":
        raise PassError(
            f"{settings.optimizer} does not work on sharded weights", key="optimizer", fix="set `optimizer: adamw`"
        )
    log, close = _log(settings, context)
    samples = _samples(student, settings, context)
    steps = _steps(samples, settings)
    teachers = open_teachers(student, samples, settings, context)
    terms = _terms(student, teachers, settings)
    model = _student_model(student, settings, context)
    masks = _masks(student, model)
    vocabulary = shared_vocabulary(student, teachers)
    widths = {_width(t) for t in teachers[:1]}
    torch.manual_seed(context.seed)
    objective = Objective(
        model,
        task_name(student.spec),
        terms,
        vocabulary=vocabulary,
        teacher_width=widths.pop() if terms.of_inside else None,
        pooling=_pooling(student),
        teacher_pooling=_pooling(teachers[0]) if teachers else None,
    ).to(begins_on(context))
    check_reader(objective.reader, samples, context)
    if settings.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise PassError(f"{type(model).__name__} has no gradient checkpointing", key="gradient_checkpointing")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of its new name, which older transformers do not have
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if context.world > 1:
        masks = _sharded(objective, model, masks, context.device)
    if settings.compile:
        model.base_model.compile()
    says, filled = teachers_say(teachers, terms, vocabulary, samples, steps, settings, context, ranks)
    how = How(
        steps=steps,
        batch=settings.batch,
        update=Update(settings.optimizer, settings.rate, settings.schedule, settings.warmup, settings.weight_decay),
        micro=settings.micro_batch,
        clip=settings.clip,
        autocast=settings.autocast,
        average=settings.average,
        every=settings.evaluate_every or max(1, steps // 20, _LOOKED * settings.held_out // settings.batch),
        patience=settings.patience,
        seed=context.seed,
    )
    if (epochs := steps * settings.batch / samples.train) > 1:
        context.progress.message(f"the training data is gone through {epochs:.2g} times")
    training = Training(
        objective,
        says,
        samples,
        how,
        device=context.device,
        progress=context.progress,
        state=RunState(context.work / "training", ranks),
        masks=masks,
        log=log,
    )
    history = training.run()
    close()
    if history.best_step == 0 and not settings.allow_noop:
        raise PassError(
            "training did not help: no weights were better on held-out samples than those it began with",
            key="rate",
            fix="lower `rate`, take more steps, or set `allow_noop: true` to go on without",
        )
    context.details["training"] = {
        "steps": history.steps,
        "samples": samples.train,
        "held_out_samples": samples.held_out,
        "epochs": round(history.steps * settings.batch / samples.train, 3),
        "of": "tokens" if samples.batches.images is None else "images",
        "tokens": history.tokens,
        "tokens_per_second": round(history.tokens / max(history.seconds, 1e-9), 1),
        "best_step": history.best_step,
        "stopped": history.stopped,
        "held_out": history.held_out,
        "losses": history.train,
        **filled,
    }
    return _trained(student, model, context)


def _pooling(checkpoint: Checkpoint) -> Pooling | None:
    return read_pooling(checkpoint.folder) if checkpoint.folder is not None else None


def _samples(student: Checkpoint, settings: DistillSettings, context: Context) -> Samples:
    """Training samples, of which the last are held out. Raises `DataError`."""
    batches: Batches = context.data("training")
    task = task_name(student.spec)
    if len(batches.ids) < settings.held_out + settings.batch:
        raise DataError(
            f"the training data gives {len(batches.ids)} samples, {settings.held_out} are held out and a step takes "
            f"{settings.batch}",
            where="data.training",
            fix="name more text, or set a shorter `length`, or a smaller `held_out` or `batch`",
        )
    if context.world > settings.batch:
        raise PassError(
            f"a batch of {settings.batch} samples has not one for each of {context.world} processes", key="batch"
        )
    weights = losses(student.spec, settings)
    if task == "classes" and "labels" in weights and batches.labels is None:
        raise DataError(
            "the loss `labels` needs labelled text", where="data.training", fix="name the columns: `text`, `label`"
        )
    masking = None
    if task == "masked":
        assert student.folder is not None
        tokenizer = load_tokenizer(student.folder, trust_remote_code=student.trust_remote_code)
        if tokenizer.mask_token_id is None:
            raise DataError("the tokenizer has no mask token, which masked language modelling needs")
        masking = Masking(
            int(tokenizer.mask_token_id),
            frozenset(tokenizer.all_special_ids),
            min(len(tokenizer), shared_vocabulary(student, [])),
            context.seed,
            fixed=settings.teacher_cache is not None,
        )
    order = list(range(len(batches.ids)))
    random.Random(context.seed).shuffle(order)  # token ids that are given may lie in any order
    return Samples(batches.at(order), task, settings.held_out, masking)


def _steps(samples: Samples, settings: DistillSettings) -> int:
    if settings.steps is not None:
        return settings.steps
    if settings.tokens is not None:
        if samples.batches.images is not None:
            raise PassError("images are not counted in tokens", key="tokens", fix="give `steps` or `epochs`")
        mask = samples.batches.mask
        each = samples.batches.ids.shape[1] if mask is None else float(mask.sum() / len(mask))
        return max(1, round(settings.tokens / (each * settings.batch)))
    return max(1, round((settings.epochs or 1.0) * samples.train / settings.batch))


def _depth(checkpoint: Checkpoint) -> int:
    config = checkpoint.spec.structure.config
    return architectures.of(config).depth(config)


def _width(checkpoint: Checkpoint) -> int:
    config = checkpoint.spec.structure.config
    record = architectures.of(config)
    return int(record.value(config, record.hidden_key))


def _terms(student: Checkpoint, teachers: list[Checkpoint], settings: DistillSettings) -> Terms:
    weights = losses(student.spec, settings)
    states: tuple[tuple[int, int], ...] = ()
    vectors = None
    if teachers:
        mine, theirs = _depth(student), _depth(teachers[0])
        if "hidden" in weights:
            states = settings.layer_map or tuple((i, round(i * theirs / mine)) for i in range(mine + 1))
            for pair in states:
                if not (0 <= pair[0] <= mine and 0 <= pair[1] <= theirs):
                    raise PassError(
                        f"{list(pair)} is out of range: the student's outputs are 0 to {mine}, the teacher's 0 to {theirs}",
                        key="layer_map",
                    )
        if "relations" in weights:
            vectors = settings.relation_layers or (mine - 1, theirs - 1)
            if not (0 <= vectors[0] < mine and 0 <= vectors[1] < theirs):
                raise PassError(
                    f"{list(vectors)} is out of range: the student has {mine} blocks, the teacher {theirs}",
                    key="relation_layers",
                )
            for checkpoint in (student, teachers[0]):
                config = checkpoint.spec.structure.config
                record = architectures.of(config)
                if (width := narrowing.kv_heads(record, config) * record.head_dim(config)) % settings.relation_heads:
                    raise PassError(
                        f"vectors of {width} entries do not split into {settings.relation_heads} heads",
                        key="relation_heads",
                        fix=f"set relation_heads to a divisor of {width}, such as {math.gcd(width, settings.relation_heads)}",
                    )
    return Terms(weights, settings.temperature, settings.skew, states, vectors, settings.relation_heads)


def _student_model(student: Checkpoint, settings: DistillSettings, context: Context) -> Any:
    """The student in float32."""
    if settings.student is not None and settings.student.init == "random":
        found, config = stock_class(student)
        torch.manual_seed(context.seed)
        model = found(config) if hasattr(found, "config_class") and found.config_class else found.from_config(config)
        return model.float().to(begins_on(context))
    return load_checkpoint(student, dtype="float32", device=begins_on(context))


def _masks(student: Checkpoint, model: Any) -> dict[str, torch.Tensor]:
    """Parameter name ▶ what of it is kept, where a keep-mask removes something; fused by the loader as weights are."""
    if not any(t.kept is not None and t.kept < t.count for t in student.spec.stored()):
        return {}

    def read(name: str) -> Value:
        value = student.tensor(name)
        return Value(torch.ones_like(value.data) if value.mask is None else value.mask.to(value.data.dtype))

    spec = student.spec.map(lambda t: replace(t, kept=None, grid=None))
    kept = load_checkpoint(Derived(student, spec, read), dtype="bfloat16")
    named = dict(model.named_parameters())
    masks = {name: p.detach() > 0.5 for name, p in kept.named_parameters()}
    return {name: mask.to(named[name].device) for name, mask in masks.items() if not bool(mask.all())}


def _sharded(
    objective: Objective, model: Any, masks: Mapping[str, torch.Tensor], device: str
) -> dict[str, torch.Tensor]:
    """Shard the student, and its masks alike."""
    shard(objective, blocks_of(model), device)
    named = dict(model.named_parameters())
    return {name: like(mask, named[name]) for name, mask in masks.items()}


def _log(settings: DistillSettings, context: Context) -> tuple[Any, Any]:
    """What writes TensorBoard logs, and what closes them."""
    if settings.tensorboard is None or context.rank:
        return None, lambda: None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise PassError(
            "logs for TensorBoard need the package tensorboard", key="tensorboard", fix="pip install tensorboard"
        ) from None
    writer = SummaryWriter(settings.tensorboard)

    def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


def _trained(student: Checkpoint, model: Any, context: Context) -> Checkpoint:
    """The student's checkpoint with the model's weights, named and shaped as in its file."""
    folder = context.work / "trained"
    state = {}
    for name, value in model.state_dict().items():
        full = whole(value)  # every process takes part, the first one keeps it
        if context.rank == 0:
            state[name] = full
    if context.rank:
        return student
    config = model.config
    config._name_or_path = ""
    edits = to_json(student.spec.structure.edits)
    for name in shared_parameters(model, edits):
        del state[name]
    # the stock writer names and splits tensors as files have them
    with quiet_transformers():
        model.save_pretrained(folder, state_dict=state)
    if edits:
        (folder / "config.json").write_bytes(render_config(student.spec))
    written = open_checkpoint(folder)
    spec = student.spec
    names = {t.name for t in spec.stored()}
    if lost := sorted(names - {t.name for t in written.spec.stored()}):
        raise PassError(
            f"transformers writes this model without {lost[0]}, so it cannot be trained in place",
            fix="load it with from_pretrained, save it with save_pretrained, and start from that",
        )

    def read(name: str) -> Value:
        data = written.tensor(name).data.to(torch_dtype(spec.tensors[name].dtype))
        return Value(data, student.tensor(name).mask if spec.tensors[name].kept is not None else None)

    return Derived(student, spec, read)
