"""Reading and writing checkpoints: folder ▶ headers ▶ logical tensors ▶ folder.

`headers` describes without torch. `open` reads, `write` writes atomically. `storage` has the codecs, one a file,
and `store` chooses among them. `bundle` and `modeling` make the loader that compact checkpoints carry. docs/format.md
specifies the files.
"""
