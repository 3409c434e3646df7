"""Distillation: train a student towards teachers, and restore what earlier passes lost."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from compress.architectures.model_map import model_map
from compress.checkpoint.open import open_headers
from compress.errors import PassError
from compress.evaluation.tasks import IMAGES, is_seq2seq, task_of
from compress.files import expanded
from compress.passes.base import EDITED, Context, Pass, Storage
from compress.passes.distill.plan import (
    bytes_per_token,
    check_cache,
    check_losses,
    check_teacher,
    mlp_neurons,
    pairs_inside,
    student_cut,
)
from compress.passes.distill.settings import DistillSettings
from compress.passes.distill.work import distill_work
from compress.passes.prune_structured.prune_structured import PruneStructured
from compress.passes.work import DataSizes
from compress.spec.spec import Spec
from compress.work import Work

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint

#: Bytes of a parameter's gradient, and of its optimizer state, in float32.
GRADIENT_BYTES = 4
STATE_BYTES = {"adamw": 8, "muon": 8, "adafactor": 1}
#: Tokens of a sample, to estimate the memory of activations.
ACTIVATION_TOKENS = 256


class Distill(Pass[DistillSettings]):
    """Trains the checkpoint, or a smaller student cut from it, on the predictions of the original or of other teachers.

    Masks stay as they are; shared tensors train once and stay shared. The weights with the lowest held-out loss are kept.
    Under torchrun student and teachers are sharded (FSDP2). A killed run continues from its last state.

    Sample recipe::

        data:
          training: {files: [train.txt], length: 256}
        passes:
          - prune_structured: {layers: 2, mlp: 25%}
          - distill: {tokens: 2000000}
    """

    name: ClassVar[str] = "distill"
    summary: ClassVar[str] = "Train the checkpoint, or a smaller student, to do as its teachers do."
    settings = DistillSettings
    mode = "train"
    needs = frozenset({"training"})
    accepts: ClassVar[frozenset[Storage]] = EDITED | {"float"}
    source: ClassVar[str] = "Hinton et al., arXiv 1503.02531; DistilBERT, arXiv 1910.01108; each loss names its paper"

    def memory(self, spec: Spec, settings: DistillSettings, width: int) -> int:
        """Bytes of weights, gradients, optimizer state, averages, a copy for validation, teachers and activations."""
        student = self.plan(spec, settings).parameters
        each = 4 + GRADIENT_BYTES + STATE_BYTES[settings.optimizer] + (8 if settings.ema_decay is not None else 0)
        teachers = 0
        if settings.needs_teacher():
            # sizes of other teachers are unknown here; assume that of the input
            teachers = len(settings.teacher) * width * spec.parameters
        return student * each + teachers + _activations(spec, settings)

    def work(self, spec: Spec, settings: DistillSettings, sizes: DataSizes) -> Work | None:
        """Work of the training, and of cutting a student."""
        return distill_work(self.plan(spec, settings), sizes.original or spec, settings, sizes.training)

    def plan(self, spec: Spec, settings: DistillSettings) -> Spec:
        """Shapes of the student. Only values change: masks and dtypes stay."""
        record = model_map(spec).record
        if record.input != "input_ids" and task_of(spec.structure.class_name) is not IMAGES:
            raise PassError(f"training data is text, or images of classes, and this model reads `{record.input}`")
        if not is_seq2seq(spec.structure) and any(record.in_stack(n) and not record.in_tower(n) for n in spec.tensors):
            raise PassError(f"{spec.structure.class_name} reads two texts, and training data are one")
        check_losses(spec, settings)
        student = spec
        if settings.student is not None and (cut := student_cut(spec, settings)) is not None:
            student = PruneStructured().plan(spec, cut)
        first = None
        for number, folder in enumerate(self.checkpoints(settings)):
            if expanded(folder).is_dir():  # teachers on the hub are checked when they are opened
                teacher = open_headers(folder, trust_remote_code=True)[0]
                check_teacher(student, teacher, folder)
                first = teacher if number == 0 and settings.teacher[0].checkpoint == folder else first
        if settings.needs_teacher():
            pairs_inside(student, first, settings)
            check_cache(settings, int(spec.structure.config.get("vocab_size") or 1 << 31))
        return student

    def checkpoints(self, settings: DistillSettings) -> list[str]:
        """Teachers other than the original."""
        return (
            [t.checkpoint for t in settings.teacher if t.checkpoint != "original"] if settings.needs_teacher() else []
        )

    def plan_notes(self, spec: Spec, settings: DistillSettings) -> list[str]:
        """Bytes of the teacher cache."""
        if settings.teacher_cache is None:
            return []
        k, vocabulary = settings.teacher_cache.top_k, int(spec.structure.config.get("vocab_size") or 1 << 31)
        return [f"teacher cache: {bytes_per_token(k, vocabulary)} bytes per token (k = {k})"]

    def prepare(self, checkpoint: Checkpoint, settings: DistillSettings, context: Context) -> None:
        """Refuse too little training data, unfit teachers, and losses that student or teachers cannot give."""
        from compress.checkpoint.values import Derived
        from compress.distributed import ProcessGroup
        from compress.passes.distill.train import prepare

        student = Derived(checkpoint, self.plan(checkpoint.spec, settings), checkpoint.tensor)
        prepare(student, settings, context, ProcessGroup())

    def apply(self, checkpoint: Checkpoint, settings: DistillSettings, context: Context) -> Checkpoint:
        """The trained student."""
        from compress.passes.distill.train import distill

        self.plan(checkpoint.spec, settings)
        student = checkpoint
        if settings.student is not None and (cut := student_cut(checkpoint.spec, settings)) is not None:
            student = PruneStructured().apply(
                checkpoint, cut, replace(context, workspace=context.workspace.folder("student"))
            )
        return distill(student, settings, context)


def _activations(spec: Spec, settings: DistillSettings) -> int:
    """Bytes of the activations that the backward pass needs: an estimate, for samples of `ACTIVATION_TOKENS`."""
    depth, hidden = model_map(spec).depth, model_map(spec).hidden
    tokens = ACTIVATION_TOKENS * (settings.micro_batch_size or settings.batch_size)
    inside = 8 * hidden + 3 * (mlp_neurons(spec) or 4 * hidden)
    per_token = depth * hidden + inside if settings.gradient_checkpointing else depth * inside
    return 4 * tokens * per_token
