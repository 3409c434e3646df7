"""The contract of a target of exports, and what is planned for one. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from compress.errors import CompressError
from compress.settings import Settings
from compress.spec.spec import Spec

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint
    from compress.progress import Progress

S = TypeVar("S", bound=Settings)


class ExportError(CompressError):
    """A checkpoint that a target cannot hold, or a package that an export needs and that is not installed."""


@dataclass(frozen=True, slots=True)
class ExportRow:
    """Tensors that are stored alike.

    Attributes:
        source: storage in the checkpoint. type: in the export. tensors: number. bytes: in the export.
        exact: whether the export has the same values, bit for bit.
    """

    source: str
    type: str
    tensors: int
    bytes: int
    exact: bool


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """An export before it is written.

    Attributes:
        target: its name. bytes: of all its files. exact: whether ``bytes`` is exact.
        rows: tensors by storage. notes: sentences for the user.
    """

    target: str
    bytes: int
    rows: tuple[ExportRow, ...]
    exact: bool = True
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON object, schema ``compress.export/1``."""
        rows = [{name: getattr(row, name) for name in ExportRow.__slots__} for row in self.rows]
        values = {"target": self.target, "bytes": self.bytes, "exact": self.exact}
        return {"schema": "compress.export/1", **values, "tensors": rows, "notes": list(self.notes)}


class Target(ABC, Generic[S]):
    """A format of another runtime.

    Attributes:
        name: in recipes and on the command line. summary: one sentence for help.
        ending: of the path beside the output of a recipe.
        settings: model of its settings; each field is an option of ``compress export``.
        packages: modules that it imports; ``extra``: the extra that brings them.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    ending: ClassVar[str]
    settings: ClassVar[type[Settings]]
    packages: ClassVar[Sequence[str]] = ()
    extra: ClassVar[str] = ""

    @abstractmethod
    def plan(self, spec: Spec, folder: Path, settings: S) -> ExportPlan:
        """The size of an export and its tensors, from headers and sidecars.

        Args:
            folder: folder with the tokenizer.

        Raises:
            ExportError: the target cannot hold the checkpoint; the error names the setting that would do.
        """

    @abstractmethod
    def write(self, checkpoint: Checkpoint, path: Path, settings: S, progress: Progress) -> None:
        """Write the export to ``path``, which does not exist. `plan` has accepted the checkpoint."""

    def require(self) -> None:
        """Raise `ExportError` where a package is not installed."""
        require(self.packages, self.extra, f"an export to {self.name}")


def require(packages: Sequence[str], extra: str, what: str) -> None:
    """Raise `ExportError`, with the line of pip, where a package is not installed."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise ExportError(
            f"{what} needs {' and '.join(missing)}",
            fix=f"pip install {' '.join(missing)} (or the extra: pip install '.[{extra}]')",
        )
