"""Benchmarks of attention: `make bench-attention`. A file of this folder is a job, with ``TITLE`` and ``rows(options)``."""
