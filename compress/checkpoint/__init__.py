"""Reading and writing checkpoints: folder ▶ headers ▶ logical tensors ▶ folder. docs/format.md specifies the files.

- Contract: `values` (a value, a checkpoint).
- Opening: `open`; `files` and `hub` find weight files, `headers` reads them, `claims` checks the config, `tidy` leaves out what
  is not the model's, `remote` runs code that the user trusts, `patterns` matches module names.
- Writing: `write`; `store` chooses a codec for each tensor, `layout` places arrays in shards, `sidecars` copies other files.
- Registries: `storage`, the codecs; `edits`, the changes of structure.
- Loader of compact checkpoints: `modeling`, made a file of its own by `bundle`. `running`: requirements on runtimes.
"""
