"""The command line: the only place that prints. Command bodies import what they need when they run.

``compress --help`` and ``compress check`` load neither torch, transformers nor numpy.
"""

from __future__ import annotations


def main() -> None:
    """Entry point of the ``compress`` command."""
    import os
    import signal

    def stop(number: int, frame: object) -> None:  # nothing was begun that would have to be put in order
        os.write(2, b"compress: interrupted\n")
        os._exit(130)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    from compress.cli.guard import guarded

    guarded(_app)


def _app() -> object:
    """The commands; imported under the guard."""
    from compress.cli.app import app

    return app(standalone_mode=True)
