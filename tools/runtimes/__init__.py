"""Opens exports in the runtimes that they are for; `python -m tools.runtimes`."""
