"""Launcher: ``python cli.py run recipe.yaml`` from a checkout. The installed command is ``compress``."""

from compress.cli import main

if __name__ == "__main__":
    main()
