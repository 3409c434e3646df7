"""Causal attention over a part of the tokens, without a mask of all pairs.

`patterns.attention` is the function, `patterns.LocalPattern` says which tokens a query sees, `interface.register` makes the
function known to transformers as ``compress_local``. The halves below a mark are copied into the modelling file of compact
checkpoints. Importing this package loads no torch; its modules do.
"""

from __future__ import annotations

#: Names of the modules whose lower halves the modelling file holds, in the order of its text.
MODULES = ("merged", "patterns", "interface")
