"""Structured pruning: remove whole units and repair the rest; the result is a smaller stock model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from compress.architectures import resize
from compress.architectures.model_map import model_map
from compress.blockwise.memory_budget import TRIAL_SAMPLES, most_trials
from compress.errors import PassError
from compress.passes.allocation import PROBES
from compress.passes.base import Context, InputMultiple, Mode, Pass, Storage
from compress.passes.blockwise import require_head, trains_predictions
from compress.passes.memory import divergence_memory, runner_memory, trials_memory
from compress.passes.prune_structured import slicing, widths
from compress.passes.prune_structured.equivalence import require_equivalent
from compress.passes.prune_structured.removable import alike, removable
from compress.passes.prune_structured.settings import KINDS, PruneStructuredSettings
from compress.passes.prune_structured.work import structured_work
from compress.passes.work import DataSizes
from compress.solvers.memory import OBS, OBS_WITH_BIAS
from compress.spec.spec import Spec
from compress.work import Work

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint


class PruneStructured(Pass[PruneStructuredSettings]):
    """Blocks, experts, hidden channels, heads and neurons are removed, in that order; the config follows.

    Each token may be sent to fewer experts; then experts are removed by what they do for that number. Heads of keys and values
    may be merged instead of removed. All blocks keep the same widths, unless MLPs get widths of their own. So the result is a
    stock model of the same family or, if its config forbids the number of heads, of one that computes the same (Llama ▶
    Mistral). Blocks are repaired in order, each on the outputs of the repaired blocks before it.

    Sample recipe::

        passes:
          - prune_structured: {layers: 2, mlp: 25%}
    """

    name: ClassVar[str] = "prune_structured"
    summary: ClassVar[str] = (
        "Remove neurons, heads, experts, hidden channels or blocks; the result is a smaller stock model."
    )
    settings = PruneStructuredSettings
    mode = "blockwise"
    needs = frozenset({"calibration"})
    yields: ClassVar[frozenset[Storage]] = frozenset({"float", "uneven"})
    source: ClassVar[str] = (
        "obs: Optimal Brain Surgeon in groups, as in ZipLM, arXiv 2302.04089; activation: Minitron, arXiv 2407.14679; taylor: "
        "arXiv 1906.10771; block_influence: ShortGPT, arXiv 2403.03853; contiguous blocks: arXiv 2403.17887; experts: REAP, "
        "arXiv 2510.13999; KV heads: arXiv 2412.20677; in front of removed blocks: ReplaceMe, arXiv 2505.02819; block "
        "reconstruction: BRECQ, arXiv 2102.05426"
    )

    def required_data(self, settings: PruneStructuredSettings) -> frozenset[str]:
        """Calibration data, unless all blocks are named, or scored by weights alone, and nothing is repaired."""
        reads = _chosen_by_score(settings) or _by_gradient(settings) or _sweeps(settings)
        return self.needs if reads else frozenset()

    def depends_on_effort(self, settings: PruneStructuredSettings) -> bool:
        """Where blocks are reconstructed, or could be with another effort."""
        return settings.compensation == "reconstruction" or "compensation" not in settings.model_fields_set

    def followed_by(self, settings: PruneStructuredSettings, later: InputMultiple) -> PruneStructuredSettings:
        """Choose multiples that later passes need and prefer, where none are given and any width changes."""
        if settings.mlp is None and settings.hidden is None and not settings.searched:
            return settings
        given = {"multiple_of": settings.multiple_of, "preferred_multiple": settings.preferred_multiple}
        needs = {"multiple_of": later.needed, "preferred_multiple": later.preferred}
        chosen = {key: needs[key] for key, value in given.items() if value is None and needs[key] > 1}
        return settings.model_copy(update=chosen)

    def plan_notes(self, spec: Spec, settings: PruneStructuredSettings) -> list[str]:
        """The kept widths, where later passes want multiples; and how many sets of blocks are tried."""
        if settings.searched:
            return []
        texts = [widths.multiples_note(spec, settings)]
        if _by_trials(settings) and settings.layers is not None and not isinstance(settings.layers, tuple):
            depth = model_map(spec).depth
            count = widths.layers_to_drop(depth, settings.layers, settings.allow_noop)
            tries = most_trials(depth, count, groups=True)
            texts.append(
                f"choosing {count} of {depth} blocks tries at most {tries} sets, each on at most {TRIAL_SAMPLES} samples"
            )
        return [text for text in texts if text is not None]

    def output_storage(self, settings: PruneStructuredSettings) -> frozenset[Storage]:
        """Floats; with `allocation: kl` also uneven widths."""
        return self.yields if settings.allocation == "kl" else frozenset({"float"})

    def mode_for(self, settings: PruneStructuredSettings) -> Mode:
        """``blockwise`` if activations of blocks are read, else ``stream``."""
        return "blockwise" if _sweeps(settings) else "stream"

    def memory(self, spec: Spec, settings: PruneStructuredSettings, width: int) -> int | None:
        """Bytes of the block runner and its teacher; or of the whole model, to try blocks or for gradients."""
        gradients = _gradient_memory(spec, width) if _by_gradient(settings) else 0
        trials = trials_memory(spec, width) if _by_trials(settings) else 0
        if not _sweeps(settings):
            if trials and model_map(spec).record.source != "written":
                return None  # a model that does not run block by block is run whole
            return max(gradients, trials) or None
        mapped = model_map(spec)
        names = {linear.name for linear in mapped.layers if len(linear.tensor.shape) == 2}
        tuned = settings.compensation == "reconstruction"
        biased = any(f"{spec.tensors[name].module}.bias" in spec.tensors for name in names)
        solver = OBS_WITH_BIAS if biased else OBS
        filled = settings.layers is not None and settings.compensation != "none"
        teacher = spec if (tuned and _has_teacher(settings)) or filled else None
        reconstruction: Literal["floats"] | None = "floats" if tuned else None
        runner = runner_memory(spec, names, width, solver, reconstruction=reconstruction, teacher=teacher)
        if tuned and trains_predictions(spec, settings.reconstruction_target):
            runner += _prediction_memory(spec, width)
        loads = settings.searched or (_chosen_by_score(settings) and not trials)
        whole = (1 + settings.searched) * width * spec.parameters if loads else 0
        if settings.allocation == "kl":
            readers = [f"{units.name}.weight" for units, _ in widths.widths(spec, settings).mlps()]
            whole = max(whole, divergence_memory(spec, readers, width, solver, PROBES))
        return max(runner, whole, gradients, trials)

    def work(self, spec: Spec, settings: PruneStructuredSettings, sizes: DataSizes) -> Work | None:
        """Work of choosing blocks, and of the block runner."""
        return structured_work(spec, settings, sizes.calibration)

    def plan(self, spec: Spec, settings: PruneStructuredSettings) -> Spec:
        """Exact if blocks are named or all alike. Otherwise scores on data decide which blocks are removed.

        What an inferred record says is proved first, on a small copy of the model.
        """
        planned = self._planned(spec, settings)
        require_equivalent(spec, planned, settings)
        return planned

    def _planned(self, spec: Spec, settings: PruneStructuredSettings) -> Spec:
        if settings.only or settings.skip:
            raise PassError(
                "`only` and `skip` do not apply to units that go from every block",
                key="only" if settings.only else "skip",
                fix="name blocks in `layers`",
            )
        mapped = model_map(spec)
        record = mapped.record
        if settings.layers is not None:
            resize.require_numbered_blocks(record)
        if settings.importance == "taylor":
            require_head(spec, "importance: taylor", "importance", "set `importance: obs`")
        if self.required_data(settings):
            mapped.require_one_list("set `importance: magnitude` and `compensation: none`")
        if settings.searched:
            from compress.passes.prune_structured.search import estimate

            return replace(estimate(self, spec, settings), exact=False)  # trying decides which shape
        exact = spec.exact
        if settings.layers is not None:
            depth = mapped.depth
            count = widths.layers_to_drop(depth, settings.layers, settings.allow_noop)
            named = settings.layers if isinstance(settings.layers, tuple) else tuple(range(depth - count, depth))
            exact = exact and (isinstance(settings.layers, tuple) or alike(spec))
            before = spec
            spec, _ = resize.without_blocks(spec, named)
            _require_class(record.source, spec, before)
        if settings.active_experts is not None:
            spec = widths.with_active_experts(spec, widths.active_experts(spec, settings.active_experts))
        if settings.experts is not None:
            keep = widths.experts_to_keep(spec, settings.experts)
            spec, _, _ = resize.without_experts(spec, {i: range(n) for i, n in keep.items()})
        if settings.hidden is not None:
            left = widths.hidden_to_keep(spec, settings.hidden, settings.multiples)
            entries, config = resize.hidden_entries(spec, range(left))
            spec = resize.resized(spec, entries, config)
        narrower = widths.widths(spec, settings)
        spec, _ = slicing.narrowed(spec, narrower.first(), narrower)
        return replace(spec, exact=exact and spec.exact and not narrower.uneven)

    def apply(self, checkpoint: Checkpoint, settings: PruneStructuredSettings, context: Context) -> Checkpoint:
        """Remove one kind of unit after the other; each step reads the result of the one before."""
        from compress.passes.prune_structured import remove
        from compress.passes.prune_structured.active_experts import fewer_active

        self.plan(checkpoint.spec, settings)
        if settings.searched:
            from compress.passes.prune_structured.search import search

            settings = search(self, checkpoint, settings, context)
        current, spans = remove.drop_layers(checkpoint, settings, context, removable(self.plan, checkpoint.spec))
        current = fewer_active(current, settings, context)
        current = remove.drop_experts(current, settings, context)
        current, channels = remove.drop_hidden(current, settings, context)
        return remove.narrow(checkpoint, current, spans, channels, settings, context)


def _chosen_by_score(settings: PruneStructuredSettings) -> bool:
    """Whether blocks are chosen on data."""
    return settings.searched or (settings.layers is not None and not isinstance(settings.layers, tuple))


def _by_trials(settings: PruneStructuredSettings) -> bool:
    """Whether blocks are chosen by leaving them out on trial, one block in memory at a time."""
    return _chosen_by_score(settings) and (settings.searched or settings.layer_importance == "kl")


def _by_gradient(settings: PruneStructuredSettings) -> bool:
    """Whether units are chosen by gradients of the whole model."""
    narrower = settings.searched or settings.mlp is not None or _fewer_heads(settings)
    return narrower and settings.importance == "taylor"


def _fewer_heads(settings: PruneStructuredSettings) -> bool:
    return settings.heads is not None or settings.kv_heads is not None


def _gradient_memory(spec: Spec, width: int) -> int:
    """Bytes of the model, gradients of its matrices, and activations of 1,024 tokens for the backward pass."""
    mapped = model_map(spec)
    matrices = [linear.tensor for linear in mapped.layers if len(linear.tensor.shape) == 2]
    vocabulary = max(t.shape[0] for t in mapped.outside)
    activations = 1024 * (
        width * sum(sum(t.shape) for t in matrices) + 3 * 4 * vocabulary
    )  # logits, their softmax, gradient
    return width * (spec.parameters + sum(t.count for t in matrices)) + activations


def _prediction_memory(spec: Spec, width: int) -> int:
    """Bytes of the largest table outside the blocks, the head at most, and five float32 logits of 1,024 tokens."""
    head = max(model_map(spec).outside, key=lambda t: t.count)
    return width * head.count + 1024 * 5 * 4 * head.shape[0]


def _has_teacher(settings: PruneStructuredSettings) -> bool:
    """Whether student and original differ in blocks, experts or hidden width, so both must be loaded."""
    others = (settings.layers, settings.active_experts, settings.experts, settings.hidden)
    return settings.searched or any(amount is not None for amount in others)


def _sweeps(settings: PruneStructuredSettings) -> bool:
    widths = settings.mlp is not None or _fewer_heads(settings)
    others = settings.hidden is not None or settings.keep_kv_heads is not None
    by_inputs = (widths and settings.importance in ("obs", "activation")) or (
        others and settings.importance != "magnitude"
    )
    repaired = settings.compensation != "none" and any(getattr(settings, kind) is not None for kind in KINDS)
    return settings.searched or settings.experts is not None or by_inputs or repaired


def _require_class(source: str, spec: Spec, before: Spec) -> None:
    """Raise `PassError` where the class, built with fewer blocks, expects other tensors; for records not written by hand."""
    if source == "inferred" and not spec.structure.edits:
        from compress.architectures.inference import misfit

        if (problem := misfit(spec, before)) is not None:
            raise PassError(f"no block of {spec.structure.model_type} can be removed: {problem}", key="layers")
