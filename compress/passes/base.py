"""The interface of a pass: settings, a plan on headers, and `apply` on weights.

A pass is a class with the attributes of `Pass`. `compress.passes` lists the folders of this package and the entry points of
the group ``compress.passes``. The order of passes follows from ``accepts`` and ``yields`` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from math import lcm
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

from pydantic import Field

from compress.passes.details import PassDetails
from compress.passes.effort import Effort, EffortDefaults
from compress.settings import Settings
from compress.spec.spec import Spec

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint
    from compress.distributed import ProcessGroup
    from compress.passes.work import DataSizes
    from compress.progress import Progress
    from compress.work import Work
    from compress.workspace import Workspace

Mode = Literal["stream", "blockwise", "train"]
#: Kinds of storage: floats, codes of any kind, tensors that several blocks share, low-rank factors, widths that differ between
#: blocks, and floats of an attention whose heads see windows.
Storage = Literal["float", "integer", "shared", "factored", "uneven", "windowed"]
#: Edits of structure. A pass that works matrix by matrix, or on the whole model, accepts them.
EDITED: frozenset[Storage] = frozenset({"shared", "factored", "uneven", "windowed"})


class PassSettings(Settings):
    """Settings that every pass has.

    Attributes:
        efforts: defaults that the setting ``effort`` chooses; None for a pass without that setting.
    """

    efforts: ClassVar[EffortDefaults | None] = None

    only: list[str] = Field(
        default_factory=list,
        description="Limit the pass to matching modules: globs, or regular expressions after `re:`.",
    )
    skip: list[str] = Field(
        default_factory=list, description="Modules that the pass leaves unchanged: globs, or `re:` expressions."
    )
    allow_noop: bool = Field(
        default=False, description="Continue if the pass would change nothing. Otherwise that is an error."
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Check the defaults by effort."""
        if cls.efforts is not None:
            cls.efforts.check(cls)


@dataclass(frozen=True)
class Context:
    """Everything that a pass may know besides checkpoint and settings. There is no ambient state.

    Attributes:
        original: the checkpoint that the run started from.
        device: torch device string.
        dtype: dtype string of the computation, such as ``float32``.
        seed: seed of every random choice.
        max_ram: bytes the pass may use; None for no limit.
        data: function from the name of a data set (``calibration``, ``training``) to its batches, which are read on first use.
        progress: receives steps and messages.
        workspace: durable state, keyed by the stage's fingerprint: cached results, and what a killed run continues from.
        offline: use only hub files that are cached.
        max_vram: bytes of a GPU's memory that the pass may fill with hidden states; None for most of what is free.
        details: facts for the report, JSON values.
    """

    original: Checkpoint
    device: str
    dtype: str
    seed: int
    max_ram: int | None
    data: Callable[[str], Any]
    progress: Progress
    workspace: Workspace
    offline: bool = False
    max_vram: int | None = None
    details: PassDetails = field(default_factory=PassDetails)

    @property
    def processes(self) -> ProcessGroup:
        """The processes that apply the pass together."""
        return self.workspace.processes

    def part(self, name: str, *, data: Callable[[str], Any] | None = None) -> Context:
        """Context for a pass that this one applies alone in this process, in the folder ``name`` of the workspace.

        Args:
            data: replaces the data sets.
        """
        return replace(
            self, workspace=self.workspace.folder(name).alone(), data=self.data if data is None else data, details={}
        )


class InputMultiple(NamedTuple):
    """Numbers that the inputs of every matrix must be, and should be, a multiple of. 1 for any inputs."""

    needed: int = 1
    preferred: int = 1

    def joined(self, other: InputMultiple) -> InputMultiple:
        """Multiples that suit both."""
        return InputMultiple(lcm(self.needed, other.needed), lcm(self.preferred, other.preferred))


S = TypeVar("S", bound=PassSettings)


class Pass(Generic[S]):
    """One kind of compression. Subclasses set the class attributes and define `plan` and `apply`.

    Attributes:
        settings: the settings model; its field descriptions are the help text.
        mode: ``stream`` (tensor by tensor), ``blockwise`` (block by block) or ``train`` (the whole model).
        needs: names of the data sets it reads; `required_data` may narrow them by settings.
        accepts: kinds of storage that it can read.
        yields: kinds of storage that its output may have; a kind that it leaves unchanged is one of them.
        source: paper or repository, for help and docs.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    settings: type[S]
    mode: ClassVar[Mode]
    needs: ClassVar[frozenset[str]] = frozenset()
    accepts: ClassVar[frozenset[Storage]] = frozenset({"float"})
    yields: ClassVar[frozenset[Storage]] = frozenset({"float"})
    source: ClassVar[str] = ""

    def completed(self, settings: S, given: Collection[str], store: Literal["stock", "compact"]) -> S:
        """Settings with the defaults that depend on which data sets a recipe has, and on its store."""
        return settings

    def input_multiple(self, settings: S) -> InputMultiple:
        """Multiples that these settings need, or prefer, the inputs of matrices to be, such as those of groups."""
        return InputMultiple()

    def followed_by(self, settings: S, later: InputMultiple) -> S:
        """Settings with the defaults that depend on what the later passes of a recipe need. By default none do."""
        return settings

    def required_data(self, settings: S) -> frozenset[str]:
        """Names of the data sets that these settings need; by default all of ``needs``."""
        return self.needs

    def depends_on_effort(self, settings: S) -> bool:
        """Whether what the setting ``effort`` chooses has an effect; by default if data are read."""
        return bool(self.required_data(settings))

    def check_samples(self, settings: S, name: str, length: int) -> None:
        """Check the number of tokens per sample of a data set that the pass reads. Raises `DataError`."""

    def mode_for(self, settings: S) -> Mode:
        """Mode with these settings; by default ``mode``."""
        return self.mode

    def output_storage(self, settings: S) -> frozenset[Storage]:
        """Kinds of storage of the output with these settings; by default all of ``yields``."""
        return self.yields

    def plan(self, spec: Spec, settings: S) -> Spec:
        """Spec of the checkpoint that `apply` will write, from headers alone. Raises `PassError` if it cannot apply."""
        raise NotImplementedError

    def memory(self, spec: Spec, settings: S, width: int) -> int | None:
        """Bytes resident at the peak, beside the interpreter, with floats of ``width`` bytes.

        None if the mode says it: a few tensors (``stream``), or the whole model for a pass that reads data.
        """
        return None

    def work(self, spec: Spec, settings: S, sizes: DataSizes) -> Work | None:
        """Work of the pass, for the time that it takes, without writing; None where it is not known.

        Args:
            sizes: of the recipe's data.
        """
        return None

    def checkpoints(self, settings: S) -> list[str]:
        """Folders and hub ids of the checkpoints that it reads besides its input and the original."""
        return []

    def plan_notes(self, spec: Spec, settings: S) -> list[str]:
        """Remarks for the plan besides sizes and memory, one sentence each."""
        return []

    def prepare(self, checkpoint: Checkpoint, settings: S, context: Context) -> None:
        """Check data and other checkpoints. A run calls this for all of its passes before the first one is applied.

        Args:
            checkpoint: the planned input of the pass: it has a spec and sidecars, and no weights.

        Raises:
            CompressError: `apply` would fail for any weights.
        """

    def apply(self, checkpoint: Checkpoint, settings: S, context: Context) -> Checkpoint:
        """The changed checkpoint, lazily: weights are read when the writer asks for them."""
        raise NotImplementedError


#: Words for a module with an edit, for errors.
EDITS = {
    "shared": "shares tensors with other blocks",
    "factored": "is two factors",
    "uneven": "has a width of its own",
    "windowed": "has windows by head, first tokens that stay, or a pattern",
}


def chosen_by_effort(instance: Pass[Any], settings: PassSettings) -> list[str]:
    """Return what the effort chose, one sentence for the plan; nothing where the recipe gave all, or it has no effect."""
    if settings.efforts is None or not instance.depends_on_effort(settings):
        return []
    effort: Effort = getattr(settings, "effort")  # noqa: B009  # a field of the subclass
    shown = settings.efforts.shown(effort, leave=settings.model_fields_set)
    return [f"effort {effort} chooses {shown}"] if shown else []


def accepted_values(instance: Pass[Any]) -> str:
    """The kinds of values that a pass accepts, for errors."""
    return " and ".join(sorted(instance.accepts - EDITED))
