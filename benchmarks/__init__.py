"""Benchmarks: each writes its section of docs/benchmarks.md."""
