"""Checkpoints: folder ▶ header ▶ logical tensors, and back, atomically.

`spec` and `headers` describe without torch; `open` reads, `write` writes, `codecs` and `decode` are the storage chain,
`bundle` and `modeling` make the compact store load elsewhere.
"""
