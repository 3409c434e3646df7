"""Teachers of a distillation: open and check them, run them beside the student, or read their cache. Imports torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from compress.architectures.model_map import model_map
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.sidecars import LinkedFolder, safe_file, with_links
from compress.checkpoint.values import Checkpoint
from compress.data.batches import check_positions, check_vocabulary
from compress.distributed import ProcessGroup
from compress.errors import PassError
from compress.evaluation.tasks import IMAGES, task_of
from compress.models.blocks import find_blocks, record_of
from compress.models.loading import load_for_samples
from compress.models.processors import has_tokenizer, load_image_processor, load_tokenizer
from compress.passes.base import Context
from compress.passes.distill.plan import bytes_per_token, check_teacher
from compress.passes.distill.settings import DistillSettings
from compress.training.data import Samples
from compress.training.features import FeatureModel
from compress.training.objective import Signal, Terms
from compress.training.sharding import shard
from compress.training.teacher_cache import SHARD, TeacherCache
from compress.training.teachers import Teachers, TeacherSignal, frozen_teacher

#: Tokens of the sample on which logits by parts are compared with whole ones.
_PROBE = 16
#: Samples per forward pass when a cache is filled.
_ASKED = 16


def open_teachers(
    student: Checkpoint, samples: Samples, settings: DistillSettings, context: Context, processes: ProcessGroup
) -> list[Checkpoint]:
    """Checkpoints of the teachers. Raises `PassError` unless task, vocabulary and size suit the student."""
    if not settings.needs_teacher():
        return []
    teachers: list[Checkpoint] = []
    for entry in settings.teacher:
        teacher: Checkpoint = context.original
        if entry.checkpoint != "original":
            place = with_links(entry.checkpoint, type(context.original.folder) is LinkedFolder)
            options = {
                "trust_remote_code": context.original.trust_remote_code,
                "ignore_auto_map": context.original.ignore_auto_map,
                "offline": context.offline,
            }
            if processes.rank == 0:
                open_checkpoint(place, **options)  # downloads missing files
            processes.barrier()
            teacher = open_checkpoint(place, **options)
        check_teacher(student.spec, teacher.spec, entry.checkpoint)
        _check_processors(student, teacher, entry.checkpoint)
        if samples.batches.images is None:
            check_vocabulary(samples.batches, teacher.spec.structure.config.get("vocab_size"), entry.checkpoint)
            positions = model_map(teacher.spec).positions
            check_positions(samples.batches.ids.shape[1], positions, entry.checkpoint, name="training")
        teachers.append(teacher)
    return teachers


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
                fix="use a teacher with the student's image processor",
            )
        return
    files = [safe_file(folder, "tokenizer.json") for folder in (student.folder, teacher.folder)]
    if all(f.is_file() for f in files) and files[0].read_bytes() == files[1].read_bytes():
        return
    if not all(has_tokenizer(folder) for folder in (student.folder, teacher.folder)):
        return  # training data are token ids, and no tokenizer defines them
    mine, theirs = (load_tokenizer(c.folder, trust_remote_code=c.trust_remote_code) for c in (student, teacher))  # type: ignore[arg-type]
    ours, others = mine.get_vocab(), theirs.get_vocab()
    if ours != others:
        word = next((w for w in ours if others.get(w) != ours[w]), next((w for w in others if w not in ours), ""))
        raise PassError(
            f"the teacher {name} has another tokenizer: `{word}` is token {ours.get(word, 'none')} for the student and "
            f"{others.get(word, 'none')} for the teacher",
            key="teacher",
            fix="use a teacher with the student's tokenizer",
        )


def shared_vocabulary(student: Checkpoint, teachers: list[Checkpoint]) -> int:
    """Number of ids that all models have; further rows are padding of the larger embeddings."""
    sizes = [c.spec.structure.config.get("vocab_size") for c in (student, *teachers)]
    return min((int(size) for size in sizes if size is not None), default=1 << 31)


def teacher_signal(
    teachers: list[Checkpoint],
    terms: Terms,
    vocabulary: int,
    samples: Samples,
    steps: int,
    settings: DistillSettings,
    context: Context,
    processes: ProcessGroup,
) -> tuple[TeacherSignal, dict[str, Any]]:
    """The source of the teachers' predictions, and its row for the report."""
    if not teachers:
        return (lambda batch: Signal()), {}
    if settings.teacher_cache is None:
        return _load_teachers(teachers, terms, vocabulary, samples, settings, context), {}
    k = settings.teacher_cache.top_k
    cache = TeacherCache(Path(settings.teacher_cache.folder), k, vocabulary)
    if context.processes.rank == 0:
        cache.prepare(_key(teachers, samples, settings, vocabulary, context.dtype))
    processes.barrier()
    needed = {row for row, _ in samples.held}
    order = samples.order(settings.batch_size, context.seed)
    for step in range(min(steps, -(-samples.train // settings.batch_size) + 1)):
        needed |= {row for row, _ in order.step(step)}
    missing = cache.missing(needed)
    processes.barrier()
    filled = 0
    if missing:
        models = _load_teachers(teachers, terms, vocabulary, samples, settings, context)
        filled = _fill(cache, missing, models, samples, context, processes)
    return cache, {
        "teacher_cache": {
            "k": k,
            "bytes_per_token": bytes_per_token(k, vocabulary),
            "samples_added": filled,
            "folder": settings.teacher_cache.folder,
        }
    }


def _fill(
    cache: TeacherCache,
    missing: list[int],
    teachers: Teachers,
    samples: Samples,
    context: Context,
    processes: ProcessGroup,
) -> int:
    """Write the missing shards; return the number of samples. All processes run the teachers, the first one writes."""
    count, total = 0, len(samples.batches.ids)
    with context.progress.task("running teachers", len(missing), "shards") as task:
        for shard_ in missing:
            rows = list(range(shard_ * SHARD, min((shard_ + 1) * SHARD, total)))
            predictions: list[tuple[torch.Tensor, torch.Tensor]] = []
            for begin in range(0, len(rows), _ASKED):
                batch = samples.batch([(row, 0) for row in rows[begin : begin + _ASKED]], (1, 1), context.device)
                ids, values = teachers.top_k(batch, cache.k)
                sizes = batch.predict.sum(1).tolist()
                predictions += list(zip(torch.split(ids.cpu(), sizes), torch.split(values.cpu(), sizes), strict=True))
            if context.processes.rank == 0:
                cache.write(shard_, predictions)
            processes.barrier()
            count += len(rows)
            task.advance()
    return count


def _key(
    teachers: list[Checkpoint], samples: Samples, settings: DistillSettings, vocabulary: int, dtype: str
) -> dict[str, Any]:
    """Everything that the contents of a cache depend on."""
    hashes = []
    for teacher in teachers:
        whole_ = hashlib.sha256(json.dumps(teacher.spec.structure.config, sort_keys=True, default=str).encode())
        for tensor in teacher.spec.stored():
            data = teacher.tensor(tensor.name).data.contiguous()
            whole_.update(tensor.name.encode())
            whole_.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
        hashes.append(whole_.hexdigest())
    # the ids depend on tokenizer, text and packing
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


def _load_teachers(
    teachers: list[Checkpoint],
    terms: Terms,
    vocabulary: int,
    samples: Samples,
    settings: DistillSettings,
    context: Context,
) -> Teachers:
    """Models of the teachers, each loaded once."""
    task = task_of(teachers[0].spec.structure.class_name)
    models = []
    for number, teacher in enumerate(teachers):
        model = load_for_samples(teacher, dtype=context.dtype, device=load_device(context))
        own = terms if number == 0 else Terms({"kl": 1.0}, terms.temperature)
        features = frozen_teacher(model, task, own)
        check_logits(features, samples, context)
        if context.processes.world > 1:
            shard(features.base, blocks_of(model), context.device)
            for child in model.children():
                if child is not features.base:
                    child.to(context.device)
        models.append(features)
    total = sum(entry.weight for entry in settings.teacher)
    return Teachers(models, [entry.weight / total for entry in settings.teacher], terms, vocabulary)


def check_logits(features: FeatureModel, samples: Samples, context: Context) -> None:
    """Find out on a short sample how logits can be computed, and report if that takes more memory."""
    inputs = samples.batch([(0, 0)], (1, 1), load_device(context)).inputs
    if not features.check({name: value[:, :_PROBE] for name, value in inputs.items()}):
        what = type(features.model).__name__
        context.progress.message(f"logits of {what} cannot be made a few tokens at a time: they take more memory")


def load_device(context: Context) -> str:
    """Device on which models are loaded: sharding moves them to their own device part by part."""
    return context.device if context.processes.world == 1 else "cpu"


def blocks_of(model: Any) -> Any:
    """The list of blocks of a transformers model."""
    return find_blocks(model, record_of(model))
