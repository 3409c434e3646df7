"""Tables and lines that the commands print on stdout."""

from compress.cli.tables.architecture import print_architecture
from compress.cli.tables.checkpoint import print_diff, print_inspection
from compress.cli.tables.listing import print_pass, print_passes, print_runs
from compress.cli.tables.plan import print_plan
from compress.cli.tables.report import print_evaluation, print_gates, print_report

__all__ = [
    "print_architecture",
    "print_diff",
    "print_evaluation",
    "print_gates",
    "print_inspection",
    "print_pass",
    "print_passes",
    "print_plan",
    "print_report",
    "print_runs",
]
