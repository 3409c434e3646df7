"""Recipes to begin with, chosen from the headers of a checkpoint. Imports no torch.

facts (headers, tokenizer, text at hand) ▶ drafts (of a goal, or a preset) ▶ fitting (the first that a plan accepts)
▶ a mapping, which `compress run --preset` runs ▶ rendering (a commented recipe), which `compress init` writes
"""
