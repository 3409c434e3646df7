"""The work of `distill`: models, data and the loop come together here. Imports torch."""

from __future__ import annotations

import hashlib
import json
import math
import random
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress import architectures
from compress.architectures import narrowing
from compress.calibration.batches import check_positions, check_vocabulary
from compress.calibration.influence import find_blocks
from compress.calibration.ranks import Ranks
from compress.checkpoint.open import Checkpoint, Derived, Value, open_checkpoint, torch_dtype
from compress.errors import DataError, PassError
from compress.evaluation.embeddings import Pooling, read_pooling
from compress.evaluation.tasks import IMAGES, label_ids, task_of
from compress.loading import (
    has_tokenizer,
    load_checkpoint,
    load_image_processor,
    load_tokenizer,
    quiet_transformers,
    stock_class,
)
from compress.passes.base import Context
from compress.passes.distill import bytes_per_token, losses, task_name
from compress.passes.distill_settings import DistillSettings
from compress.training.cache import SHARD, TeacherCache
from compress.training.data import Masking, Samples
from compress.training.loop import How, Training
from compress.training.models import Reader
from compress.training.objective import Objective, Signal, Terms
from compress.training.optimize import Update
from compress.training.sharding import like, shard, whole
from compress.training.state import RunState
from compress.training.teacher import Says, Teachers, reader_of

if TYPE_CHECKING:
    from compress.calibration.batches import Batches

#: Samples trained on for each held-out one, at least, so that looking at these takes little of the time.
_LOOKED = 4
#: Tokens of the sample on which the ways to make logits are compared.
_PROBE = 16
#: Samples that teachers are asked about at a time when a cache is filled.
_ASKED = 16


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
    teachers = _teachers(student, samples, settings, context)
    terms = _terms(student, teachers, settings)
    model = _student_model(student, settings, context)
    masks = _masks(student, model)
    vocabulary = _vocabulary(student, teachers)
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
    ).to(_begins_on(context))
    _check_reader(objective.reader, samples, context)
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
    says, filled = _says(teachers, terms, vocabulary, samples, steps, settings, context, ranks)
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


def _begins_on(context: Context) -> str:
    """Where models are loaded: sharding moves them to the device part by part."""
    return context.device if context.world == 1 else "cpu"


def _pooling(checkpoint: Checkpoint) -> Pooling | None:
    return read_pooling(checkpoint.folder) if checkpoint.folder is not None else None


def _check_reader(reader: Reader, samples: Samples, context: Context) -> None:
    """See how logits can be made, on a short sample, and say where that takes more memory."""
    inputs = samples.batch([(0, 0)], (1, 1), _begins_on(context)).inputs
    if not reader.check({name: value[:, :_PROBE] for name, value in inputs.items()}):
        what = type(reader.model).__name__
        context.progress.message(f"logits of {what} cannot be made a few tokens at a time: they take more memory")


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
            min(len(tokenizer), _vocabulary(student, [])),
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


def _teachers(student: Checkpoint, samples: Samples, settings: DistillSettings, context: Context) -> list[Checkpoint]:
    """Checkpoints of the teachers, which are of the student's task, vocabulary and no smaller. Raises `PassError`."""
    if not settings.needs_teacher():
        return []
    found: list[Checkpoint] = []
    for entry in settings.teacher:
        teacher: Checkpoint = context.original
        if entry.checkpoint != "original":
            how = {"trust_remote_code": student.trust_remote_code, "offline": context.offline}
            if context.rank == 0:
                open_checkpoint(entry.checkpoint, **how)  # downloads what is not there
            Ranks(context.rank, context.world).wait()
            teacher = open_checkpoint(entry.checkpoint, **how)
        if task_of(teacher.spec.structure.class_name) is not task_of(student.spec.structure.class_name):
            raise PassError(
                f"the teacher {entry.checkpoint} is for {task_of(teacher.spec.structure.class_name).name}, the student for "
                f"{task_of(student.spec.structure.class_name).name}",
                key="teacher",
            )
        if teacher.spec.parameters < student.spec.parameters:
            raise PassError(
                f"the student has {student.spec.parameters:,} parameters, more than the teacher {entry.checkpoint}: "
                f"{teacher.spec.parameters:,}",
                key="teacher",
                fix="take a larger teacher, or make the student smaller",
            )
        _check_processors(student, teacher, entry.checkpoint)
        _check_labels(student, teacher, entry.checkpoint)
        if samples.batches.images is None:
            check_vocabulary(samples.batches, teacher.spec.structure.config.get("vocab_size"), entry.checkpoint)
            positions = architectures.positions(teacher.spec)
            check_positions(samples.batches.ids.shape[1], positions, entry.checkpoint, name="training")
        found.append(teacher)
    return found


def _check_processors(student: Checkpoint, teacher: Checkpoint, name: str) -> None:
    if student.folder is None or teacher.folder is None or student.folder.resolve() == teacher.folder.resolve():
        return
    if task_of(student.spec.structure.class_name) is IMAGES:
        ours, others = (load_image_processor(c.folder).to_dict() for c in (student, teacher))  # type: ignore[arg-type]
        if wrong := sorted(key for key in {*ours, *others} if ours.get(key) != others.get(key)):
            raise PassError(
                f"the teacher {name} has another image processor: `{wrong[0]}` is {others.get(wrong[0])}, for the student "
                f"{ours.get(wrong[0])}",
                key="teacher",
                fix="learn from a teacher that sees images as the student does",
            )
        return
    files = [folder / "tokenizer.json" for folder in (student.folder, teacher.folder)]
    if all(f.is_file() for f in files) and files[0].read_bytes() == files[1].read_bytes():
        return
    if not all(has_tokenizer(folder) for folder in (student.folder, teacher.folder)):
        return  # token ids are given, and nobody says what they mean
    mine, theirs = (load_tokenizer(c.folder, trust_remote_code=c.trust_remote_code) for c in (student, teacher))  # type: ignore[arg-type]
    ours, others = mine.get_vocab(), theirs.get_vocab()
    if ours != others:
        word = next((w for w in ours if others.get(w) != ours[w]), next((w for w in others if w not in ours), ""))
        raise PassError(
            f"the teacher {name} has another tokenizer: `{word}` is token {ours.get(word, 'none')} for the student and "
            f"{others.get(word, 'none')} for the teacher",
            key="teacher",
            fix="learn from a teacher with the student's tokenizer",
        )


def _check_labels(student: Checkpoint, teacher: Checkpoint, name: str) -> None:
    if task_name(student.spec) != "classes":
        return
    mine, theirs = (label_ids(c.spec.structure.config)[0] for c in (student, teacher))
    if mine != theirs:
        raise PassError(f"the teacher {name} has the labels {theirs}, the student {mine}", key="teacher")


def _depth(checkpoint: Checkpoint) -> int:
    config = checkpoint.spec.structure.config
    return architectures.of(config).depth(config)


def _width(checkpoint: Checkpoint) -> int:
    config = checkpoint.spec.structure.config
    record = architectures.of(config)
    return int(record.value(config, record.hidden_key))


def _vocabulary(student: Checkpoint, teachers: list[Checkpoint]) -> int:
    """Ids that all know; rows beyond are padding of the larger tables."""
    sizes = [c.spec.structure.config.get("vocab_size") for c in (student, *teachers)]
    return min((int(size) for size in sizes if size is not None), default=1 << 31)


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
        return model.float().to(_begins_on(context))
    return load_checkpoint(student, dtype="float32", device=_begins_on(context))


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
    shard(objective, _blocks(model), device)
    named = dict(model.named_parameters())
    return {name: like(mask, named[name]) for name, mask in masks.items()}


def _blocks(model: Any) -> Any:
    return find_blocks(model, architectures.of(model.config.to_dict()))


def _says(
    teachers: list[Checkpoint],
    terms: Terms,
    vocabulary: int,
    samples: Samples,
    steps: int,
    settings: DistillSettings,
    context: Context,
    ranks: Ranks,
) -> tuple[Says, dict[str, Any]]:
    """Who tells what teachers say, and what the report says of it."""
    if not teachers:
        return (lambda batch: Signal()), {}
    if settings.teacher_cache is None:
        return _at_work(teachers, terms, vocabulary, samples, settings, context), {}
    k = settings.teacher_cache.k
    if k >= vocabulary:
        raise PassError(f"k of {k} is not below the vocabulary of {vocabulary}", key="teacher_cache")
    cache = TeacherCache(Path(settings.teacher_cache.folder), k, vocabulary)
    if context.rank == 0:
        cache.prepare(_key(teachers, samples, settings, vocabulary, context.dtype))
    ranks.wait()
    needed = {row for row, _ in samples.held}
    order = samples.order(settings.batch, context.seed)
    for step in range(min(steps, -(-samples.train // settings.batch) + 1)):
        needed |= {row for row, _ in order.step(step)}
    missing = cache.missing(needed)
    ranks.wait()
    filled = 0
    if missing:
        models = _at_work(teachers, terms, vocabulary, samples, settings, context)
        filled = _fill(cache, missing, models, samples, context, ranks)
    return cache, {
        "teacher_cache": {
            "k": k,
            "bytes_per_token": bytes_per_token(k, vocabulary),
            "samples_added": filled,
            "folder": settings.teacher_cache.folder,
        }
    }


def _fill(
    cache: TeacherCache, missing: list[int], teachers: Teachers, samples: Samples, context: Context, ranks: Ranks
) -> int:
    """Ask the teachers about the samples of missing shards. Every process asks; the first writes."""
    count, total = 0, len(samples.batches.ids)
    with context.progress.task("asking teachers", len(missing), "shards") as task:
        for shard_ in missing:
            rows = list(range(shard_ * SHARD, min((shard_ + 1) * SHARD, total)))
            said: list[tuple[torch.Tensor, torch.Tensor]] = []
            for begin in range(0, len(rows), _ASKED):
                batch = samples.batch([(row, 0) for row in rows[begin : begin + _ASKED]], (1, 1), context.device)
                ids, values = teachers.likeliest(batch, cache.k)
                sizes = batch.predict.sum(1).tolist()
                said += list(zip(torch.split(ids.cpu(), sizes), torch.split(values.cpu(), sizes), strict=True))
            if context.rank == 0:
                cache.write(shard_, said)
            ranks.wait()
            count += len(rows)
            task.advance()
    return count


def _key(
    teachers: list[Checkpoint], samples: Samples, settings: DistillSettings, vocabulary: int, dtype: str
) -> dict[str, Any]:
    """What the contents of a cache depend on."""
    hashes = []
    for teacher in teachers:
        whole_ = hashlib.sha256(json.dumps(teacher.spec.structure.config, sort_keys=True, default=str).encode())
        for tensor in teacher.spec.stored():
            data = teacher.tensor(tensor.name).data.contiguous()
            whole_.update(tensor.name.encode())
            whole_.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
        hashes.append(whole_.hexdigest())
    # the ids stand for tokenizer, text and packing
    masking = samples.masking
    return {
        "teachers": hashes,
        "weights": [entry.weight for entry in settings.teacher],
        "temperature": settings.temperature,
        "vocabulary": vocabulary,
        "dtype": dtype,
        "samples": samples.batches.sha256(),
        "masking": None if masking is None else [masking.seed, masking.mask],
    }


def _at_work(
    teachers: list[Checkpoint],
    terms: Terms,
    vocabulary: int,
    samples: Samples,
    settings: DistillSettings,
    context: Context,
) -> Teachers:
    """The teachers' models, each loaded once."""
    task = task_name(teachers[0].spec)
    readers = []
    for number, teacher in enumerate(teachers):
        model = load_checkpoint(teacher, dtype=context.dtype, device=_begins_on(context))
        own = terms if number == 0 else Terms({"kl": 1.0}, terms.temperature)
        reader = reader_of(model, task, own)
        _check_reader(reader, samples, context)
        if context.world > 1:
            shard(reader.base, _blocks(model), context.device)
            for child in model.children():
                if child is not reader.base:
                    child.to(context.device)
        readers.append(reader)
    total = sum(entry.weight for entry in settings.teacher)
    return Teachers(readers, [entry.weight / total for entry in settings.teacher], terms, vocabulary)


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
    # the stock writer names and splits tensors as files have them
    with quiet_transformers():
        model.save_pretrained(folder, state_dict=state)
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
