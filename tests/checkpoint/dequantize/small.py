"""Pico checkpoints in the storage of other tools, made from floats by the published formulas."""

from __future__ import annotations

import json

import torch
import transformers
from safetensors.torch import load_file, save_file

from compress.architectures.model_map import model_map
from compress.checkpoint.open import open_checkpoint
from compress.models.pico import pico_model
from compress.models.shrink import default_config, shrunken
from tests import pico


def rewritten(folder, change, quantization, config=None):
    """The folder with other arrays: ``change(state)``, and with a ``quantization_config``."""
    state = change(load_file(folder / "model.safetensors"))
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((folder / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps({**said, "quantization_config": quantization}))
    return folder


def fp8_state(state, chosen, block=16):
    """With the chosen matrices in fp8, and a scale for each square of weights; the last ones may be smaller."""
    out = dict(state)
    for name in chosen:
        weight = state[name]
        rows, columns = (-(-n // block) for n in weight.shape)
        padded = torch.nn.functional.pad(
            weight.float(), (0, columns * block - weight.shape[1], 0, rows * block - weight.shape[0])
        )
        scale = padded.reshape(rows, block, columns, block).abs().amax((1, 3)) / 448
        wide = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)
        out[name] = (padded / wide)[: weight.shape[0], : weight.shape[1]].to(torch.float8_e4m3fn)
        out[f"{name}_scale_inv"] = scale
    return out


def fp8_config(block=16):
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [block, block],
    }


def fp8_blocks(folder, family="deepseek_v3", block=16):
    """Linear layers of the blocks in fp8."""

    def change(state):
        names = [n for n, w in state.items() if w.ndim == 2 and ".layers." in n and "gate.weight" not in n]
        return fp8_state(state, names, block)

    pico.save(folder, family, dtype=torch.bfloat16)
    return rewritten(folder, change, fp8_config(block))


def mxfp4(folder):
    """A model with fused experts of four bits, every value of which fits them."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=pico.VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=6,
        layer_types=["sliding_attention", "full_attention"], max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.to(torch.bfloat16).save_pretrained(folder)
    pico.tokenizer().save_pretrained(folder)

    def change(state):
        out = {}
        for name, value in state.items():
            if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                out[name] = value
                continue
            experts, inputs, outputs = value.shape
            shape = (experts, outputs, inputs // 32)
            out[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
            out[f"{name}_scales"] = torch.randint(120, 126, shape, dtype=torch.uint8)
        return out

    return rewritten(folder, change, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def packed_state(state, chosen, method):
    """With the chosen matrices as random 4-bit codes of ``gptq`` or ``awq`` in groups of 16."""
    out = dict(state)
    for name in chosen:
        outputs, inputs = state[name].shape
        module = name.removesuffix(".weight")
        del out[name]
        words = (inputs // 8, outputs) if method == "gptq" else (inputs, outputs // 8)
        out[f"{module}.qweight"] = torch.randint(-(2**31), 2**31, words).int()
        out[f"{module}.qzeros"] = torch.randint(-(2**31), 2**31, (inputs // 16, outputs // 8)).int()
        out[f"{module}.scales"] = (torch.rand(inputs // 16, outputs) * 0.05).half()
        if method == "gptq":
            out[f"{module}.g_idx"] = (torch.arange(inputs) // 16)[torch.randperm(inputs)].int()
    return out


def packed_config(method):
    more = {"desc_act": True, "sym": False} if method == "gptq" else {"zero_point": True, "version": "gemm"}
    return {"quant_method": method, "bits": 4, "group_size": 16, **more}


def packed(method):
    """A maker of Llama checkpoints whose projections are 4-bit codes of ``gptq`` or ``awq``, random and in range."""

    def make(folder):
        pico.save(folder, "llama", dtype=torch.float16)
        torch.manual_seed(0)
        (folder / "quantize_config.json").write_text("{}")

        def change(state):
            return packed_state(state, [n for n in state if n.endswith("_proj.weight")], method)

        return rewritten(folder, change, packed_config(method))

    return make


def wrapped(folder, class_name, method):
    """A model with several parts, whose linear layers of text are in fp8 or in codes of GPTQ; names are those of its files."""
    cls = getattr(transformers, class_name)
    model = pico_model(cls, shrunken(default_config(cls.config_class.model_type)), seed=3)
    model.to(torch.bfloat16 if method == "fp8" else torch.float16).save_pretrained(folder)
    chosen = [x.name for x in model_map(open_checkpoint(folder).spec).targets]
    torch.manual_seed(0)
    if method == "fp8":
        return rewritten(folder, lambda state: fp8_state(state, chosen), fp8_config())
    return rewritten(folder, lambda state: packed_state(state, chosen, method), packed_config(method))


def nf4(folder):
    """A Llama checkpoint whose projections are random codes of NF4 in blocks of 64, with float scales."""

    def change(state):
        out = dict(state)
        for name, weight in state.items():
            if name.endswith("_proj.weight"):
                said = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
                out[name] = torch.randint(0, 256, (weight.numel() // 2, 1), dtype=torch.uint8)
                out[f"{name}.absmax"] = torch.rand(weight.numel() // 64) * 0.5 + 0.1
                out[f"{name}.quant_map"] = torch.linspace(-1, 1, 16)
                out[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(
                    list(json.dumps(said).encode()), dtype=torch.uint8
                )
        return out

    pico.save(folder, "llama", dtype=torch.bfloat16)
    torch.manual_seed(0)
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return rewritten(folder, change, said)


MAKERS = {"fp8": fp8_blocks, "mxfp4": mxfp4, "gptq": packed("gptq"), "awq": packed("awq"), "nf4": nf4}
