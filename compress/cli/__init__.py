"""The command line: the only place that prints. Command bodies import what they need when they run.

``compress --help`` and ``compress check`` load neither torch, transformers nor numpy.
"""

from __future__ import annotations


def main() -> None:
    """Entry point of the ``compress`` command."""
    from compress.cli.app import app
    from compress.cli.guard import guarded

    guarded(app)
