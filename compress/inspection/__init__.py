"""Contents of a checkpoint, and differences between two: as JSON values, and as tables that fold equal blocks."""

from compress.inspection.contents import architecture, inspect
from compress.inspection.differences import diff
from compress.inspection.rows import difference_tables, inspection_tables

__all__ = ["architecture", "diff", "difference_tables", "inspect", "inspection_tables"]
