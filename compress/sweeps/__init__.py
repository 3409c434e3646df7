"""Sweeps: many runs of a recipe whose values are searched, and the front of the best.

    recipe.search ▶ samplers (the next trial) ▶ study (who runs which trial) ▶ trials (one run each) ▶ front ▶ outputs

`study` is the folder ``OUTPUT.sweep``, in which any number of processes and machines work together.
"""
