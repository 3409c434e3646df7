"""Dictionaries of JSON values that a prompt shows as one line, and a notebook as tables."""

from __future__ import annotations

from typing import Any

from compress.formatting import format_bytes
from compress.tabular import Shown, TextTable


class Inspection(Shown, dict[str, Any]):
    """Facts about a checkpoint, schema ``compress.inspect/1``."""

    def headline(self) -> str:
        """Family, bytes, parameters, bits per weight."""
        size = self["size"]
        kind = ", ".join(filter(None, (self["model_type"], self["class"], "compact" if self["compact"] else "")))
        return (
            f"{self['checkpoint']}: {kind}; {format_bytes(size['bytes'])}, {size['parameters']:,} parameters, "
            f"{size['bits_per_weight']:.2f} bits per weight"
        )

    def tables(self) -> list[TextTable]:
        """A row per tensor; equal ones of blocks and experts are one row."""
        from compress.inspection.rows import inspection_tables

        return inspection_tables(self)


class Differences(Shown, dict[str, Any]):
    """Differences between two checkpoints, schema ``compress.diff/1``."""

    def headline(self) -> str:
        """Bytes, blocks that were removed or added, and the number of tensors that differ."""
        from compress.inspection.rows import block_lines

        a, b = (format_bytes(size["bytes"]) for size in self["size"])
        changed = sum(row["change"] != "same" for row in self["tensors"])
        counts = f"{changed} of {len(self['tensors'])} tensors differ" if not self["same"] else "no difference"
        return "; ".join((f"{self['a']} ▶ {self['b']}: {a} ▶ {b}", *block_lines(self), counts))

    def tables(self) -> list[TextTable]:
        """Config keys and tensors that differ; those of blocks that changed alike are one row."""
        from compress.inspection.rows import difference_tables

        return difference_tables(self)


class EvaluatedCheckpoint(Shown, dict[str, Any]):
    """An evaluated checkpoint, schema ``compress.eval/1``."""

    def headline(self) -> str:
        """Size and metrics, beside those of the baseline if there is one."""
        rows = "; ".join(
            f"{name} {' ▶ '.join(filter(None, (before, after)))}" for name, before, after, _ in self._rows()
        )
        return f"{self['checkpoint']}: {rows}"

    def tables(self) -> list[TextTable]:
        """A row per measured quantity."""
        head = [("", "whole"), ("baseline", "right"), ("this", "right"), ("change", "whole")]
        return [TextTable("", head, self._rows()).filled()]

    def _rows(self) -> list[tuple[str, str, str, str]]:
        from compress.report import figures

        baseline = self.get("baseline")
        rows = figures.before_after({"original": baseline or self, "result": self})
        return [(r.name, r.before if baseline else "", r.after, r.change if baseline else "") for r in rows]
