"""Reading and writing checkpoints: folder ▶ headers ▶ logical tensors ▶ folder.

`headers` and `structure` describe without torch. `open` reads, `write` writes atomically. `codecs` and `decode` are the two
halves of the storage codecs. `bundle` and `modeling` make the loader that compact checkpoints carry. docs/format.md specifies
the files.
"""
