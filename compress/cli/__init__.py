"""The command line: the only place that prints. Command bodies import what they need when they run.

``compress --help`` and ``compress check`` load neither torch, transformers nor numpy.
"""

from __future__ import annotations


def main() -> None:
    """Entry point of the ``compress`` command."""
    import os
    import signal

    def stop(number: int, frame: object) -> None:  # nothing has started yet that needs a clean-up
        os.write(2, b"compress: interrupted\n")
        os._exit(130)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    from compress.cli.guard import guarded

    guarded(_app)


def _app() -> None:
    """Run the command line. Messages about arguments repeat them, so they are escaped."""
    import gc
    import os
    import sys

    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # it reads the metadata of every package to find them
    gc.disable()  # imports make many objects and no garbage
    try:
        from compress.cli.plain import narrowed, plain

        if (command := plain(sys.argv[1:])) is not None:
            command()
            sys.exit(0)
        from compress.cli.app import app
        from compress.escape import in_one_line, printable

        command_line = narrowed(app, sys.argv[1:])
    finally:
        gc.enable()
    try:
        status = command_line(standalone_mode=False, prog_name="compress")
    except Exception as error:
        if not hasattr(error, "format_message") or not hasattr(error, "exit_code"):
            raise
        from compress.cli.guard import fail
        from compress.cli.help import usage_error

        if type(error).__name__ == "NoArgsIsHelpError":
            sys.stderr.write(printable(error.format_message()) + "\n")
        else:
            fail(in_one_line(usage_error(error)), error.exit_code)
        sys.exit(error.exit_code)
    sys.exit(status if isinstance(status, int) else 0)
