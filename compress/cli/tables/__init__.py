"""Tables and lines that the commands print on stdout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.cli.tables.architecture import print_architecture as print_architecture
    from compress.cli.tables.checkpoint import print_diff as print_diff
    from compress.cli.tables.checkpoint import print_inspection as print_inspection
    from compress.cli.tables.comparison import print_comparison as print_comparison
    from compress.cli.tables.export import print_export as print_export
    from compress.cli.tables.fit import print_fit as print_fit
    from compress.cli.tables.listing import print_pass as print_pass
    from compress.cli.tables.listing import print_passes as print_passes
    from compress.cli.tables.listing import print_runs as print_runs
    from compress.cli.tables.plan import print_plan as print_plan
    from compress.cli.tables.report import print_evaluation as print_evaluation
    from compress.cli.tables.report import print_gates as print_gates
    from compress.cli.tables.report import print_report as print_report
    from compress.cli.tables.sweep import print_sweep as print_sweep

_HOME = {
    "print_comparison": "comparison",
    "print_architecture": "architecture",
    "print_diff": "checkpoint",
    "print_evaluation": "report",
    "print_export": "export",
    "print_fit": "fit",
    "print_gates": "report",
    "print_inspection": "checkpoint",
    "print_pass": "listing",
    "print_passes": "listing",
    "print_plan": "plan",
    "print_report": "report",
    "print_runs": "listing",
    "print_sweep": "sweep",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Import what is asked for and no more."""
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
