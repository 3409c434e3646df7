"""A small Qwen 3 of random weights, with the tokenizer of `examples/tiny-lm`."""

from __future__ import annotations

import shutil
from pathlib import Path

#: As in the models of that family, heads are wider than the width over their number, and the table is shared.
CONFIG = {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 1024, "tie_word_embeddings": True,
    "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.1,
}  # fmt: skip


def build(folder: Path, tokenizer: Path) -> None:
    """Write the model in bfloat16, with weights of a fixed seed, norms too, and the tokenizer of a folder."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**CONFIG))
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "norm" in name:
                values.uniform_(0.5, 1.5)
    model.bfloat16().save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, folder)
