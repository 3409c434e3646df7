"""The stock loader of transformers, in float32 where that is possible."""

import torch
import transformers

#: Beginnings of formats with which compressed-tensors computes in bfloat16 alone.
NARROW = ("mxfp", "nvfp")


def load(folder, causal, dtype=torch.float32):
    """A checkpoint folder's model, ``causal`` or the base model."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    coded = getattr(config, "quantization_config", None) or {}
    formats = {group.get("format") or coded["format"] for group in coded.get("config_groups", {}).values()}
    dtype = "auto" if any(name.startswith(NARROW) for name in formats) else dtype
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    return auto.from_pretrained(folder, dtype=dtype, trust_remote_code=True).eval()
