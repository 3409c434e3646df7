"""Training of a student: models, data and the loop come together here. Imports torch."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from compress.architectures.model_map import model_map
from compress.checkpoint.values import Checkpoint, Derived, Value, torch_dtype
from compress.distributed import ProcessGroup
from compress.errors import DataError, OutputError, PassError
from compress.evaluation.embeddings import Pooling, read_pooling
from compress.evaluation.tasks import MASKED, task_of
from compress.models.classes import stock_class
from compress.models.loading import load_checkpoint, load_for_samples
from compress.models.processors import load_tokenizer
from compress.passes.base import Context
from compress.passes.details import TrainingDetails
from compress.passes.distill.plan import check_cache, default_rate, default_warmup, evaluate_every, losses, pairs_inside
from compress.passes.distill.settings import DistillSettings
from compress.passes.distill.teachers import (
    blocks_of,
    check_logits,
    load_device,
    open_teachers,
    shared_vocabulary,
    teacher_signal,
)
from compress.training.data import Masking, Samples
from compress.training.features import without_dropout
from compress.training.file_names import FileNames, file_names
from compress.training.loop import History, Trainer, TrainingOptions
from compress.training.objective import Objective, Terms
from compress.training.optimize import Update
from compress.training.sharding import full_tensor, like, shard
from compress.training.state import RunState, UnusableState

if TYPE_CHECKING:
    from compress.data.batches import Batches

#: Most attempts of a training whose states on disk do not load.
_ATTEMPTS = 3
#: Routers are trained whose root mean square is at least so many times the learning rate.
_SMALL = 10


@dataclass(frozen=True)
class Prepared:
    """Everything that a training needs besides the student's weights, checked."""

    samples: Samples
    steps: int
    teachers: list[Checkpoint]
    terms: Terms
    vocabulary: int


def prepare(student: Checkpoint, settings: DistillSettings, context: Context, processes: ProcessGroup) -> Prepared:
    """Samples, teachers and losses. Reads no weights, so the student may be only planned.

    Args:
        processes: the processes that call this together.

    Raises:
        CompressError: data, teachers and settings do not fit together.
    """
    if context.processes.world > 1 and settings.optimizer != "adamw":
        raise PassError(
            f"{settings.optimizer} does not work on sharded weights", key="optimizer", fix="set `optimizer: adamw`"
        )
    samples = _samples(student, settings, context)
    teachers = open_teachers(student, samples, settings, context, processes)
    vocabulary = shared_vocabulary(student, teachers)
    if teachers:
        check_cache(settings, vocabulary)
    return Prepared(samples, _steps(samples, settings), teachers, _terms(student, teachers, settings), vocabulary)


def distill(
    student: Checkpoint,
    settings: DistillSettings,
    context: Context,
    trained: Callable[[str, torch.Tensor], bool] | None = None,
) -> Checkpoint:
    """The trained student; the unchanged student if no weights had a lower held-out loss.

    Args:
        trained: whether a parameter of the model, with that name, is trained; None for all.
    """
    processes = context.processes
    log, close = _log(settings, context)
    made = prepare(student, settings, context, processes)
    model, names = _student_model(student, settings, context, trained)
    if names.kept:
        context.progress.message(f"not part of the model, kept unchanged: {_some(sorted(names.kept))}")
    signal, cache_row = teacher_signal(
        made.teachers, made.terms, made.vocabulary, made.samples, made.steps, settings, context, processes
    )
    options = _training_options(student, made, settings, context)
    state = RunState(context.workspace.folder("training"))
    for attempt in range(_ATTEMPTS):
        _hold_routers(student, model, options.update.rate)
        objective, masks = _objective(student, model, made, settings, context)
        training = Trainer(
            objective,
            signal,
            made.samples,
            options,
            device=context.device,
            progress=context.progress,
            state=state,
            masks=masks,
            log=log,
        )
        try:
            history = training.run()
            break
        except UnusableState as error:
            if attempt + 1 == _ATTEMPTS:
                raise OutputError(
                    f"{error}, and it was written a moment ago",
                    where=str(state.workspace.path),
                    fix="check the disk",
                ) from error
            context.progress.message(f"{error}: training begins anew")
            state.drop()
            del training, objective, masks, model
            model, names = _student_model(student, settings, context, trained)
    close()
    summary = _summary(history, made.samples, options)
    context.details["training"] = cast("TrainingDetails", {**summary, **cache_row, "kept": sorted(names.kept)})
    if history.best_step == 0 and (settings.student is None or settings.student.init == "slice"):
        return student  # bit for bit the input, without a detour through float32
    return _trained(student, model, names, context)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _objective(
    student: Checkpoint, model: Any, made: Prepared, settings: DistillSettings, context: Context
) -> tuple[Objective, dict[str, torch.Tensor]]:
    """The objective that holds the student, ready to train, and the student's masks by parameter name."""
    masks = _masks(student, model)
    widths = {_width(t) for t in made.teachers[:1]}
    torch.manual_seed(context.seed)
    objective = Objective(
        model,
        task_of(student.spec.structure.class_name),
        made.terms,
        vocabulary=made.vocabulary,
        teacher_width=widths.pop() if made.terms.of_inside else None,
        pooling=_pooling(student),
        teacher_pooling=_pooling(made.teachers[0]) if made.teachers else None,
    ).to(load_device(context))
    check_logits(objective.features, made.samples, context)
    if settings.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise PassError(f"{type(model).__name__} has no gradient checkpointing", key="gradient_checkpointing")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about a new name, which older transformers lack
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if context.processes.world > 1:
        masks = _sharded(objective, model, masks, context.device)
    if settings.compile:
        model.base_model.compile()
    return objective, masks


def _training_options(
    student: Checkpoint, made: Prepared, settings: DistillSettings, context: Context
) -> TrainingOptions:
    """Options of the training; reports if the data repeats."""
    steps = made.steps
    if (epochs := steps * settings.batch_size / made.samples.train) > 1:
        context.progress.message(f"the training data repeats: {epochs:.2g} epochs")
    return TrainingOptions(
        steps=steps,
        batch=settings.batch_size,
        update=Update(
            settings.optimizer,
            settings.learning_rate or default_rate(steps, _width(student)),
            settings.schedule,
            default_warmup(steps) if settings.warmup_ratio is None else settings.warmup_ratio,
            settings.weight_decay,
        ),
        micro=settings.micro_batch_size,
        clip=settings.max_grad_norm,
        autocast=settings.autocast,
        average=settings.ema_decay,
        every=evaluate_every(settings, steps),
        patience=settings.patience,
        seed=context.seed,
    )


def _summary(history: History, samples: Samples, options: TrainingOptions) -> dict[str, Any]:
    """Row of the training for the report."""
    return {
        "steps": history.steps,
        "samples": samples.train,
        "held_out_samples": samples.held_out,
        "epochs": round(history.steps * options.batch / samples.train, 3),
        "of": "tokens" if samples.batches.images is None else "images",
        "tokens": history.tokens,
        "tokens_per_second": round(history.tokens / max(history.seconds, 1e-9), 1),
        "rate": options.update.rate,
        "best_step": history.best_step,
        "helped": history.best_step > 0,
        "stopped": history.stopped,
        "held_out": history.held_out,
        "losses": history.train,
    }


def _pooling(checkpoint: Checkpoint) -> Pooling | None:
    return read_pooling(checkpoint.folder) if checkpoint.folder is not None else None


def _samples(student: Checkpoint, settings: DistillSettings, context: Context) -> Samples:
    """Training samples, the last of which are held out. Raises `DataError`."""
    batches: Batches = context.data("training")
    task = task_of(student.spec.structure.class_name)
    if len(batches.ids) < settings.validation_samples + settings.batch_size:
        raise DataError(
            f"the training data gives {len(batches.ids)} samples, {settings.validation_samples} are held out and a step takes "
            f"{settings.batch_size}",
            where="data.training",
            fix="name more text, or set a shorter `length`, or a smaller `validation_samples` or `batch_size`",
        )
    if context.processes.world > settings.batch_size:
        raise PassError(
            f"a batch of {settings.batch_size} samples has not one for each of {context.processes.world} processes",
            key="batch_size",
        )
    weights = losses(student.spec, settings)
    if task.labels == "classes" and "labels" in weights and batches.labels is None:
        raise DataError(
            "the loss `labels` needs labelled text", where="data.training", fix="name the columns: `text`, `label`"
        )
    masking = None
    if task is MASKED:
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
    random.Random(context.seed).shuffle(order)  # given token ids may have any order
    return Samples(batches.at(order), task, settings.validation_samples, masking)


def _steps(samples: Samples, settings: DistillSettings) -> int:
    if settings.steps is not None:
        return settings.steps
    if settings.tokens is not None:
        if samples.batches.images is not None:
            raise PassError("images are not counted in tokens", key="tokens", fix="give `steps` or `epochs`")
        mask = samples.batches.mask
        each = samples.batches.ids.shape[1] if mask is None else float(mask.sum() / len(mask))
        return max(1, round(settings.tokens / (each * settings.batch_size)))
    return max(1, round((settings.epochs or 1.0) * samples.train / settings.batch_size))


def _width(checkpoint: Checkpoint) -> int:
    return model_map(checkpoint.spec).hidden


def _terms(student: Checkpoint, teachers: list[Checkpoint], settings: DistillSettings) -> Terms:
    states, vectors = pairs_inside(student.spec, teachers[0].spec, settings) if teachers else ((), None)
    weights = losses(student.spec, settings)
    return Terms(weights, settings.temperature, settings.skew, states, vectors, settings.relation_heads)


def _student_model(
    student: Checkpoint,
    settings: DistillSettings,
    context: Context,
    trained: Callable[[str, torch.Tensor], bool] | None,
) -> tuple[Any, FileNames]:
    """The student in float32, and the names of its weights in the file. Raises `PassError` if the file lacks them."""
    model = _fresh_model(student, settings, context)
    if not settings.dropout:
        without_dropout(model)
    for name, parameter in model.named_parameters():
        if trained is not None and not trained(name, parameter):
            parameter.requires_grad_(False)
    return model, file_names(student.spec, model)


def _hold_routers(student: Checkpoint, model: Any, rate: float) -> None:
    """Exclude routers from training whose values are small beside a step of the optimizer: it would choose other experts.

    `carve_experts` writes such routers, for equal weights of the chosen experts.
    """
    mapped = model_map(student.spec)
    modules = [x.module for x in mapped.linears.values() if x.role == "router"]
    for weight in (model.get_submodule(mapped.in_memory(module)).weight for module in modules):
        if float(weight.detach().square().mean().sqrt()) < _SMALL * rate:
            weight.requires_grad_(False)


def _fresh_model(student: Checkpoint, settings: DistillSettings, context: Context) -> Any:
    if settings.student is not None and settings.student.init == "random":
        model_class, config = stock_class(student)
        torch.manual_seed(context.seed)
        return model_class(config).float().to(load_device(context))
    return load_for_samples(student, dtype="float32", device=load_device(context), attention="auto")


def _masks(student: Checkpoint, model: Any) -> dict[str, torch.Tensor]:
    """Keep-masks by parameter name, of those that remove something; the loader fuses them like weights."""
    if not any(t.kept is not None and t.kept < t.count for t in student.spec.stored()):
        return {}

    def read(name: str) -> Value:
        value = student.tensor(name)
        return Value(torch.ones_like(value.data) if value.mask is None else value.mask.to(value.data.dtype))

    spec = student.spec.map(lambda t: replace(t, kept=None, quant_format=None))
    kept = load_checkpoint(Derived(student, spec, read), dtype="bfloat16")
    named = dict(model.named_parameters())
    masks = {name: p.detach() > 0.5 for name, p in kept.named_parameters()}
    return {name: mask.to(named[name].device) for name, mask in masks.items() if not bool(mask.all())}


def _sharded(
    objective: Objective, model: Any, masks: Mapping[str, torch.Tensor], device: str
) -> dict[str, torch.Tensor]:
    """Shard the student, and return its masks sharded alike."""
    shard(objective, blocks_of(model), device)
    named = dict(model.named_parameters())
    return {name: like(mask, named[name]) for name, mask in masks.items()}


def _log(settings: DistillSettings, context: Context) -> tuple[Any, Any]:
    """Functions that write TensorBoard logs, and close them."""
    if settings.tensorboard is None or context.processes.rank:
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


def _trained(student: Checkpoint, model: Any, names: FileNames, context: Context) -> Checkpoint:
    """The student's checkpoint with the model's weights, named and shaped as in its file."""
    state = {}
    for name, value in model.state_dict().items():
        full = full_tensor(value)  # every process takes part, the first one keeps it
        if context.processes.rank == 0:
            state[name] = full
    if context.processes.rank:
        return student
    spec, weights = student.spec, names.tensors(model, state)

    def read(name: str) -> Value:
        if name in names.kept:
            return student.tensor(name)
        data = weights[name].to(torch_dtype(spec.tensors[name].dtype))
        return Value(data, student.tensor(name).mask if spec.tensors[name].kept is not None else None)

    return Derived(student, spec, read)
