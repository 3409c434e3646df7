"""GGUF files of llama.cpp as checkpoints. `reader` reads headers, `opening` makes config and tensors, `view` the tokenizer."""
