"""Solvers: pure functions from tensors to tensors.

Each has a slow, obvious twin in the tests. docs/methods.md has the derivations.
"""
