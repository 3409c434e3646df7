"""What a pass is: settings, a plan on headers, and an `apply` on weights.

A pass is a class with the attributes of `Pass`; the table in `compress.passes` names them, entry points of the group
``compress.passes`` add more. The rules of order follow from ``accepts`` and ``yields`` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import Field

from compress.passes.details import PassDetails
from compress.settings import Settings
from compress.spec.spec import Spec

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint
    from compress.distributed import ProcessGroup
    from compress.progress import Progress
    from compress.workspace import Workspace

Mode = Literal["stream", "blockwise", "train"]
#: What tensors can be: floats, codes of any kind, the same in several blocks, two factors in place of one, of a width that no
#: other block has.
Storage = Literal["float", "integer", "shared", "factored", "uneven"]
#: Structure that a pass meets no difficulty with if it works matrix by matrix, or on the whole model.
EDITED: frozenset[Storage] = frozenset({"shared", "factored", "uneven"})


class PassSettings(Settings):
    """Settings that every pass has."""

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


@dataclass(frozen=True)
class Context:
    """All that a pass may know besides checkpoint and settings; there is no ambient state.

    Attributes:
        original: the checkpoint that the run started from.
        device: torch device string. dtype: dtype string of computation (``float32``).
        seed: seeds every choice. max_ram: bytes the pass may use, None for no limit.
        data: set name (``calibration`` …) to its token batches, made when first asked for.
        progress: where to report steps. workspace: durable state, keyed by the stage's fingerprint: cache and resume there.
        offline: whether hub ids come from the cache alone.
        details: facts for the report that the pass writes, JSON values.
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
    details: PassDetails = field(default_factory=PassDetails)

    @property
    def processes(self) -> ProcessGroup:
        """The processes that apply the pass together."""
        return self.workspace.processes

    def part(self, name: str, *, data: Callable[[str], Any] | None = None) -> Context:
        """The context of a pass that this one applies, alone in this process, in the folder ``name`` of the workspace.

        Args:
            data: gives it other data sets.
        """
        return replace(
            self, workspace=self.workspace.folder(name).alone(), data=self.data if data is None else data, details={}
        )


S = TypeVar("S", bound=PassSettings)


class Pass(Generic[S]):
    """One kind of compression. Subclasses set the class attributes and write the two methods.

    Attributes:
        settings: the settings model; its field descriptions are the help text.
        mode: how it works: ``stream`` (tensor by tensor), ``runner`` (block by block) or ``train``.
        needs: names of the data sets it reads, given settings (see `required_data`).
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

    def completed(self, settings: S, given: Collection[str]) -> S:
        """The settings with those defaults said that depend on which data sets a recipe has."""
        return settings

    def required_data(self, settings: S) -> frozenset[str]:
        """Data sets that these settings need; all of ``needs`` unless a pass says otherwise."""
        return self.needs

    def mode_for(self, settings: S) -> Mode:
        """How it works with these settings; ``mode`` unless a pass says otherwise."""
        return self.mode

    def output_storage(self, settings: S) -> frozenset[Storage]:
        """Storage that these settings leave behind; all of ``yields`` unless a pass says otherwise."""
        return self.yields

    def plan(self, spec: Spec, settings: S) -> Spec:
        """The checkpoint this pass will write, from headers alone. Raises `PassError` where it cannot apply."""
        raise NotImplementedError

    def memory(self, spec: Spec, settings: S, width: int) -> int | None:
        """Bytes resident at the peak beside the interpreter, computing in floats of ``width`` bytes.

        None where that follows from how the pass works: a few tensors, or for one that reads data the whole model.
        """
        return None

    def checkpoints(self, settings: S) -> list[str]:
        """Folders and hub ids of checkpoints that it reads besides its input and the original."""
        return []

    def plan_notes(self, spec: Spec, settings: S) -> list[str]:
        """What a plan says besides sizes and memory, one sentence each."""
        return []

    def prepare(self, checkpoint: Checkpoint, settings: S, context: Context) -> None:
        """Refuse what data and other checkpoints rule out. A run asks every pass that it will apply, before the first works.

        Args:
            checkpoint: what the pass will get, as planned: it has a spec and sidecars, and no weights.

        Raises:
            CompressError: `apply` would fail, whatever the weights are.
        """

    def apply(self, checkpoint: Checkpoint, settings: S, context: Context) -> Checkpoint:
        """The changed checkpoint, lazily: weights are read when the writer asks for them."""
        raise NotImplementedError


#: What is said of a module that is so.
EDITS = {"shared": "shares tensors with other blocks", "factored": "is two factors", "uneven": "has a width of its own"}


def accepted_values(instance: Pass[Any]) -> str:
    """The kinds of values that a pass accepts, for errors."""
    return " and ".join(sorted(instance.accepts - EDITED))
