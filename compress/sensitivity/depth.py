"""Which blocks a model can best do without, by the change in its output on calibration data.

Sets of blocks race: all are tried on a few samples, and on more as long as it is not clear that another set is better
(`compress.solvers.racing`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.architectures.model_map import model_map
from compress.blockwise.memory_budget import TRIAL_GROUPS, TRIAL_SAMPLES, most_trials
from compress.errors import CheckpointError, PassError
from compress.models.loading import load_for_samples
from compress.sensitivity.depth_states import BlockSet, KeptStates, Trials, WholeModel
from compress.sensitivity.ends import divergence_by_blocks
from compress.sensitivity.samples import Sample, SampleLoop
from compress.solvers.racing import behind, expected_gain

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint
    from compress.data.batches import Batches
    from compress.progress import Progress, ProgressTask
    from compress.workspace import Workspace

#: Numbers of samples after which sets leave the race, and fewest tokens of these samples.
_ROUNDS, _FEWEST_TOKENS = (2, 3, 4, 6, 8, 12, 16, 24, 32), 512
#: Probability that the set that would win on endless samples of this kind leaves a race as clearly worse.
_ERROR = 0.1
#: Samples from which on a set leaves too whose expected gain, as a share of the loss, is not worth trying it on more.
_WORTH, _WORTH_SAMPLES = 0.003, 4
#: Fewest blocks of which influence tells some that are not worth a trial, and by how many standard deviations of its error.
_INFLUENCE_BLOCKS, _INFLUENCE_ERRORS = 12, 3.0
#: Samples, at most, on which parts of a set are compared with the leader.
_PART_SAMPLES = 4
#: Tokens at a time of `divergence`: logits over a large vocabulary are wide.
_TOKENS_PER_BATCH = 1024


@dataclass(frozen=True)
class Trial:
    """A set of blocks that was tried. ``loss`` is the mean over ``samples`` of them; infinite where none was needed."""

    loss: float
    samples: int


@dataclass(frozen=True)
class DepthChoice:
    """Blocks to remove.

    Attributes:
        order: the blocks, in the order in which greedy removal takes them; of a contiguous group ascending.
        steps: for each removal, trials by the block that goes beside those that are gone.
        groups: trials of contiguous groups, and of the greedy set where there are any.
    """

    order: list[int]
    steps: list[dict[int, Trial]] = field(default_factory=list)
    groups: dict[BlockSet, Trial] = field(default_factory=dict)

    def details(self) -> dict[str, Any]:
        """Losses and numbers of samples for a report, as JSON values; a set that was not tried has no loss."""
        steps = [{str(i): trial for i, trial in step.items()} for step in self.steps]
        groups = {_name(blocks): trial for blocks, trial in self.groups.items()}
        rows: dict[str, Any] = {
            "loss_without_block": [{i: t.loss for i, t in step.items() if t.samples} for step in steps],
            "samples_without_block": [{i: t.samples for i, t in step.items()} for step in steps],
        }
        if groups:
            rows["loss_without_group"] = {name: t.loss for name, t in groups.items() if t.samples}
            rows["samples_without_group"] = {name: t.samples for name, t in groups.items()}
        return rows


@dataclass(frozen=True)
class DepthOptions:
    """How blocks are chosen.

    Attributes:
        dtype, device: of the computation. max_ram: bytes that the whole model may take, where it must; None for no limit.
        groups: try contiguous groups too. error: see `_ERROR`; with 0 every set is tried on all samples.
        can_go: whether a model can lose a set of blocks; None where it can lose any.
    """

    dtype: str
    device: str
    max_ram: int | None = None
    groups: bool = True
    error: float = _ERROR
    can_go: Callable[[BlockSet], bool] | None = None


def choose_blocks(
    checkpoint: Checkpoint,
    samples: Batches,
    count: int,
    options: DepthOptions,
    *,
    workspace: Workspace,
    progress: Progress,
) -> DepthChoice:
    """Choose ``count`` blocks: greedily the one whose removal changes the outputs least, or a contiguous group.

    The change is the mean KL divergence per token, in nats, of the smaller model's predictions from the original's; for a
    model without a head the squared error of its last hidden states over their variance in the sample. A set is not tried where
    a part of it is clearly worse than the leader already. The contiguous groups that change hidden states least (Gromov et al.,
    arXiv 2403.17887) race with the greedy set, and one is taken where it is clearly better.

    Args:
        samples: of which the first `TRIAL_SAMPLES` are used. workspace: for hidden states, and what a killed run measured.

    Raises:
        CheckpointError: NaN or infinite predictions whatever block goes.
    """
    samples = samples.first(TRIAL_SAMPLES)
    trials = _open(checkpoint, samples, options, workspace, progress)
    tries = most_trials(trials.depth, count, options.groups)
    with progress.task("trying without blocks", tries * len(samples.ids), "samples") as task:
        race = _Race(trials, _rounds(len(samples.ids), trials.length), workspace, options.error, task)
        choice = _choose(race, count, options)
    trials.close()
    return choice


def _open(
    checkpoint: Checkpoint, samples: Batches, options: DepthOptions, workspace: Workspace, progress: Progress
) -> Trials:
    """Trials on kept hidden states; of the whole model where its blocks read more than these."""
    try:
        return KeptStates(checkpoint, samples, workspace.path, dtype=options.dtype, device=options.device)
    except PassError as error:
        needed = checkpoint.spec.parameters * torch.empty((), dtype=getattr(torch, options.dtype)).element_size()
        if options.max_ram is not None and needed > options.max_ram:
            raise PassError(
                f"trying without each block needs the whole model in memory, {needed / 1e9:.2f} GB: {error.what}",
                key="layers",
                fix="raise max_ram, set `layer_importance: block_influence`, or name blocks, as in layers: [3, 4]",
            ) from None
        progress.message(f"every trial without a block runs the whole model: {error.what}")
        return WholeModel(checkpoint, samples, dtype=options.dtype, device=options.device)


def _rounds(samples: int, length: int) -> list[int]:
    """Numbers of samples after which sets leave."""
    return [*(r for r in _ROUNDS if r < samples and r * length >= _FEWEST_TOKENS), samples]


def _choose(race: _Race, count: int, options: DepthOptions) -> DepthChoice:
    depth, can_go = race.trials.depth, options.can_go or (lambda blocks: True)
    gone: list[int] = []
    steps: list[dict[int, Trial]] = []
    for _ in range(count):
        base = tuple(sorted(gone))
        sets = {_with(base, i): i for i in range(depth) if i not in gone and can_go(_with(base, i))}
        if not sets:
            raise PassError(f"no block can go beside {list(base)}" if base else "no block can go", key="layers")
        best = race.winner(sets, base)
        steps.append({i: race.trial(blocks) for blocks, i in sets.items()})
        gone.append(sets[best])
    if not options.groups or count < 2:
        return DepthChoice(gone, steps)
    greedy = tuple(sorted(gone))
    runs = dict.fromkeys([greedy, *race.groups(count, can_go)])
    best = race.winner(runs, greedy, parts=False)  # blocks that undo each other's work may go together
    # among many groups, one is a little better on few samples by chance alone
    race.measure_all([best, greedy])
    order = list(best) if race.clearly_better(best, greedy) else gone
    return DepthChoice(order, steps, {blocks: race.trial(blocks) for blocks in runs})


def _with(blocks: BlockSet, another: int) -> BlockSet:
    return tuple(sorted((*blocks, another)))


class _Race:
    """Races of sets of blocks. What was measured is kept in the workspace, round by round.

    Args:
        rounds: numbers of samples after which sets leave, ascending; the last is that of all samples.
    """

    def __init__(
        self, trials: Trials, rounds: Sequence[int], workspace: Workspace, error: float, task: ProgressTask
    ) -> None:
        self.trials = trials
        self._rounds, self._workspace, self._task = rounds, workspace, task
        self._error = error / (len(rounds) + 1)
        self._unlikely: set[int] = set()
        saved: dict[str, list[float]] = workspace.read_json("trials") or {}
        self._known: dict[BlockSet, list[float]] = {_blocks(name): values for name, values in saved.items()}

    def trial(self, blocks: BlockSet) -> Trial:
        """Loss and samples of a set, as far as it was tried."""
        samples = len(self._known.get(blocks, ()))
        return Trial(self._mean(blocks, samples) if samples else math.inf, samples)

    def groups(self, count: int, can_go: Callable[[BlockSet], bool]) -> list[BlockSet]:
        """The contiguous groups that can go and change hidden states least, by angular distance."""
        rows = range(self._rounds[0])
        starts = range(self.trials.depth - count + 1)
        angles = self.trials.angles([(i, i + count) for i in starts], rows)
        order = sorted(starts, key=lambda i: (angles[i], i))
        fitting = (blocks for i in order if can_go(blocks := tuple(range(i, i + count))))
        return list(islice(fitting, TRIAL_GROUPS))

    def winner(self, sets: Mapping[BlockSet, Any], base: BlockSet, *, parts: bool = True) -> BlockSet:
        """The set with the least loss; of equal ones the first.

        Args:
            base: the blocks that are removed already. parts: leave out sets of which a part is clearly worse than the leader.

        Raises:
            CheckpointError: no set has a finite loss.
        """
        racing = self._without_worse_parts(self._likely(list(sets), base), base) if parts else list(sets)
        for samples in self._rounds:
            self._measure(racing, samples, base)
            best = min(racing, key=lambda blocks: (self._mean(blocks, samples), blocks))
            others = [blocks for blocks in racing if blocks != best]
            worse = self._behind(others, best, samples) | self._hopeless(others, best, samples)
            racing = [blocks for blocks in racing if blocks == best or blocks not in worse]
            self._leave([blocks for blocks in others if blocks in worse])
            if len(racing) == 1:
                break
        if not math.isfinite(self._mean(best, len(self._known[best]))):
            raise CheckpointError("predictions without any one block are NaN or infinite", where="layers")
        self._leave(racing)
        return best

    def measure_all(self, sets: Sequence[BlockSet]) -> None:
        """Measure sets on all samples, where they differ."""
        if len(set(sets)) > 1 and self._error > 0:
            self._measure(sets, self._rounds[-1], ())

    def _likely(self, sets: list[BlockSet], base: BlockSet) -> list[BlockSet]:
        """The sets without blocks of which influence says, before any trial, that they cost much more than the best.

        Half of the blocks, those that turn hidden states least, are tried on the samples of the first round. The logarithm of
        the loss without a block is taken to be a linear function of that of its angle, and what it is for the other half to
        have the error that it has on the first.
        """
        if self._error > 0 and not base and len(sets) >= _INFLUENCE_BLOCKS:
            rows, blocks = range(self._rounds[0]), [i for (i,) in sets]
            angles = dict(zip(blocks, self.trials.angles([(i, i + 1) for i in blocks], rows), strict=True))
            order = sorted(blocks, key=lambda i: (angles[i], i))
            half = order[: len(order) // 2]
            self._measure([(i,) for i in half], len(rows), base)
            known = {i: self._mean((i,), len(rows)) for i in half}
            self._unlikely = _too_influential(angles, known)
            self._leave([(i,) for i in self._unlikely])
        return [blocks for blocks in sets if not self._unlikely & set(blocks)]

    def clearly_better(self, blocks: BlockSet, other: BlockSet) -> bool:
        """Whether a set is, on the samples that both were tried on."""
        samples = min(len(self._known[blocks]), len(self._known[other]))
        return blocks != other and other in self._behind([other], blocks, samples)

    def _without_worse_parts(self, sets: list[BlockSet], base: BlockSet) -> list[BlockSet]:
        """The sets of which no part was measured to be worse than the best set that is likely to lead."""
        part = {blocks: self._worst_part(blocks) for blocks in sets}
        if self._error <= 0 or not any(part.values()):
            return sets
        leader = min(sets, key=lambda blocks: (self._promise(blocks), blocks))
        most = max(n for n in self._rounds if n <= max(_PART_SAMPLES, self._rounds[0]))
        self._measure([leader], most, base)
        parts = sorted({p for blocks, p in part.items() if p is not None and blocks != leader})
        worse = set()
        for samples in (n for n in self._rounds if n <= most):
            worse |= self._behind([p for p in parts if min(most, len(self._known[p])) == samples], leader, samples)
        gone = [blocks for blocks in sets if blocks != leader and part[blocks] in worse]
        self._leave(gone)
        return [blocks for blocks in sets if blocks not in gone]

    def _worst_part(self, blocks: BlockSet) -> BlockSet | None:
        """The measured set with the largest loss among those whose blocks are all in this one; None without any."""
        parts = [other for other in self._known if set(other) < set(blocks)]
        return max(parts, key=lambda other: (self._mean(other, self._rounds[0]), other), default=None)

    def _promise(self, blocks: BlockSet) -> float:
        """Known loss of a set, or else the sum of those of its blocks, on the samples of the first round."""
        if blocks in self._known:
            return self._mean(blocks, self._rounds[0])
        return sum(self._mean((i,), self._rounds[0]) for i in blocks)

    def _behind(self, sets: Sequence[BlockSet], leader: BlockSet, samples: int) -> set[BlockSet]:
        """Which sets are clearly worse than the leader, on the first samples."""
        if not sets:
            return set()
        losses = torch.tensor([self._known[blocks][:samples] for blocks in sets], dtype=torch.float64)
        lead = torch.tensor(self._known[leader][:samples], dtype=torch.float64)
        return {blocks for blocks, gone in zip(sets, behind(losses, lead, self._error).tolist(), strict=True) if gone}

    def _hopeless(self, sets: Sequence[BlockSet], leader: BlockSet, samples: int) -> set[BlockSet]:
        """Which sets are so unlikely to be better than the leader that further samples are not worth it."""
        known = [self._known[blocks][:samples] for blocks in (leader, *sets)]
        finite = [b for b, values in zip(sets, known[1:], strict=True) if all(map(math.isfinite, values))]
        if self._error <= 0 or samples < _WORTH_SAMPLES or not finite or not all(map(math.isfinite, known[0])):
            return set()
        losses = torch.tensor([self._known[blocks][:samples] for blocks in finite], dtype=torch.float64)
        gains = expected_gain(losses, torch.tensor(known[0], dtype=torch.float64))
        return {blocks for blocks, gain in zip(finite, gains.tolist(), strict=True) if gain < _WORTH}

    def _mean(self, blocks: BlockSet, samples: int) -> float:
        """Loss per prediction that counts, on the first samples."""
        counts = self.trials.counts[:samples]
        return sum(x * n for x, n in zip(self._known[blocks], counts, strict=False)) / sum(counts)

    def _measure(self, sets: Sequence[BlockSet], samples: int, base: BlockSet) -> None:
        """Measure sets on the first samples, as far as they were not; a round's samples together."""
        for begin, end in _spans(self._rounds):
            todo = [blocks for blocks in sets if len(self._known.get(blocks, ())) < end]
            if end > samples or not todo:
                continue
            values = self.trials.losses(todo, range(begin, end), base)
            for blocks, losses in zip(todo, values, strict=True):
                self._known.setdefault(blocks, []).extend(x if math.isfinite(x) else math.inf for x in losses)
            self._workspace.write_json("trials", {_name(blocks): losses for blocks, losses in self._known.items()})
            self._task.advance(len(todo) * (end - begin))

    def _leave(self, sets: Sequence[BlockSet]) -> None:
        """Count the samples that sets are spared as done."""
        self._task.advance(sum(self._rounds[-1] - len(self._known.get(blocks, ())) for blocks in sets))


def _too_influential(angles: Mapping[int, float], losses: Mapping[int, float]) -> set[int]:
    """Blocks without a loss whose angle tells that it is clearly above the least, by regression on those with one."""
    measured = [(log(angles[i]), log(x)) for i, x in losses.items() if 0 < angles[i] < math.inf and 0 < x < math.inf]
    if len(measured) < _INFLUENCE_BLOCKS // 2:
        return set()
    x, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*measured, strict=True))
    slope = max(0.0, float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum().clamp(min=1e-12)))
    error = float((y - y.mean() - slope * (x - x.mean())).square().sum() / (len(measured) - 2)) ** 0.5
    bound = float(y.min()) + _INFLUENCE_ERRORS * error
    others = (i for i in angles if i not in losses and 0 < angles[i] < math.inf)
    return {i for i in others if float(y.mean()) + slope * (log(angles[i]) - float(x.mean())) > bound}


def _spans(rounds: Sequence[int]) -> Iterator[tuple[int, int]]:
    return zip([0, *rounds[:-1]], rounds, strict=True)


def _name(blocks: BlockSet) -> str:
    return "-".join(map(str, blocks))


def _blocks(name: str) -> BlockSet:
    return tuple(map(int, name.split("-")))


def divergence(
    before: Checkpoint, after: Checkpoint, samples: Batches, *, dtype: str, device: str, work: Path
) -> float:
    """Change of the outputs from one checkpoint to another, as in `choose_blocks`.

    One block is in memory where both have their blocks in one list, by written records; otherwise both models are.

    Args:
        work: folder of files of hidden states.
    """
    records = [model_map(one.spec).record for one in (before, after)]
    if all(record.source == "written" and not record.stacks for record in records):
        return divergence_by_blocks(before, after, samples, dtype=dtype, device=device, work=work)
    models: list[Any] = [load_for_samples(c, dtype=dtype, device=device) for c in (before, after)]
    logits = models[0].base_model is not models[0]
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for sample in SampleLoop(samples, device, tokens=_TOKENS_PER_BATCH):
            reference, changed = (_outputs(model, sample) for model in models)
            total += _difference(reference, changed, logits)
            tokens += len(reference)
    return total / tokens


def _outputs(model: Any, sample: Sample) -> torch.Tensor:
    """Logits, or hidden states, of the tokens that count, [tokens, …]; of a classifier one row per sample."""
    output: torch.Tensor = model(**sample.inputs)[0].float()
    return output if output.ndim == 2 else sample.counted(output.flatten(0, 1))


def _difference(before: torch.Tensor, after: torch.Tensor, logits: bool) -> float:
    """Summed over rows."""
    if logits:
        return float(
            torch.nn.functional.kl_div(after.log_softmax(-1), before.log_softmax(-1), reduction="sum", log_target=True)
        )
    return float((after - before).square().mean(-1).sum() / before.var())
