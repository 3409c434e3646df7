"""The block-wise engine: load one block, collect Hessians of its inputs, change it, run it, write it, drop it."""
