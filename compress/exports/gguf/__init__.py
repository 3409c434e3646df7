"""GGUF files for llama.cpp. `target` plans and writes, `types` chooses the type of a tensor, `blocks` makes its bytes."""
