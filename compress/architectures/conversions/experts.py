"""A dense MLP as an expert that all tokens use and experts that a router chooses, in stock Qwen2-MoE. No torch here.

A block's neurons are divided, so the model has as many as before, and each token uses some of them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from compress.architectures.conversions.windows import FULL, SLIDING, SOURCES, current_windows, rope_parameters
from compress.architectures.model_map import model_map
from compress.errors import PassError
from compress.spec.spec import Spec, Tensor

#: Rows of grouped matrix products are multiples of 16 bytes: 8 bfloat16 numbers.
MULTIPLE = 8
TARGET = "qwen2_moe"
_PREFIX = "Qwen2Moe"
_KINDS = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
#: Families of `conversions.windows.SOURCES` whose blocks Qwen2-MoE computes.
FAMILIES = ("llama", "mistral", "ministral", "qwen2")
_QKV = ("q_proj", "k_proj", "v_proj")
_ROPE_TYPES = frozenset({"default", "linear", "dynamic", "yarn", "longrope", "llama3"})
#: Fields of the families that Qwen2-MoE lacks, or that are written anew.
_REPLACED = ("rope_theta", "rope_scaling", "partial_rotary_factor", "pretraining_tp", "attention_bias", "mlp_bias")


@dataclass(frozen=True)
class ExpertSizes:
    """How the neurons of an MLP are divided.

    Attributes:
        shared: neurons that all tokens use. count, size: number of experts, and of neurons in each. active: experts of a token.
    """

    shared: int
    count: int
    size: int
    active: int

    @property
    def used(self) -> int:
        """Neurons that a token uses."""
        return self.shared + self.active * self.size


def neurons(spec: Spec) -> int:
    """Neurons of each MLP. Raises `PassError` for a model that cannot become a Qwen2-MoE."""
    if (problem := _obstacle(spec)) is not None:
        raise PassError(f"no stock family with experts computes what this model does: {problem}")
    return int(model_map(spec).config["intermediate_size"])


def _obstacle(spec: Spec) -> str | None:
    """Why a checkpoint cannot become a Qwen2-MoE; None where it can."""
    here, mapped = spec.structure.model_type, model_map(spec)
    if mapped.known and mapped.has_experts:
        return "it has experts already"
    if here not in FAMILIES:
        return f"{here} is not one of {', '.join(FAMILIES)}"
    source, name = SOURCES[here], spec.structure.class_name or f"{SOURCES[here].prefix}Model"
    if spec.structure.auto_model is not None:
        return "it has code of its own"
    if not name.startswith(source.prefix) or name.removeprefix(source.prefix) not in _KINDS:
        return f"{TARGET} has no class like {name}"
    biases = {n.split(".")[-2] for block in mapped.blocks for n in block.tensors if n.endswith("_proj.bias")}
    if wrong := sorted(biases - set(_QKV)) or (biases and sorted(set(_QKV) - biases)):
        return f"its `{wrong[0]}` {'has' if wrong[0] in biases else 'lacks'} a bias"
    parameters = rope_parameters(mapped.config, source.theta)
    if parameters["rope_type"] not in _ROPE_TYPES or parameters.get("partial_rotary_factor", 1) != 1:
        return f"its rotary positions are of the kind {parameters['rope_type']}, or turn a part of each head"
    inside = [t for block in mapped.blocks for name, t in block.tensors.items() if name.startswith("mlp.")]
    if masked := next((t.name for t in inside if t.kept is not None), None):
        return f"{masked} has weights removed; carve experts before pruning"
    return None


def shared_gates(spec: Spec) -> dict[int, str]:
    """Number of each block ▶ its gate of the shared expert, in a Qwen2-MoE whose router weights add up to 1; else none.

    `carve_experts` leaves that gate zero, and its router gives each of k chosen experts nearly 1/k.
    """
    if spec.structure.model_type != TARGET or not spec.structure.config.get("norm_topk_prob"):
        return {}
    gate = "mlp.shared_expert_gate.weight"
    return {b.index: b.tensors[gate].name for b in model_map(spec).blocks if gate in b.tensors}


def carved(spec: Spec, sizes: ExpertSizes, dense: Collection[int]) -> Spec:
    """The spec as a Qwen2-MoE.

    Args:
        dense: numbers of the blocks that keep their MLP.
    """
    mapped = model_map(spec)
    tensors: dict[str, Tensor] = {}
    blocks = {block.index: block for block in mapped.blocks}
    for name, tensor in spec.tensors.items():
        index = mapped.block_of(name)
        if index is None or index in dense or not name.startswith(f"{blocks[index].path}mlp."):
            tensors[name] = tensor
        elif name.endswith("mlp.down_proj.weight"):  # all of the MLP's tensors stand where this one stood
            for new in _tensors(f"{blocks[index].path}mlp.", sizes, mapped.hidden, tensor.dtype):
                tensors[new.name] = new
    return replace(spec, structure=replace(spec.structure, config=_config(spec, sizes, dense)), tensors=tensors)


def _tensors(path: str, sizes: ExpertSizes, hidden: int, dtype: str) -> list[Tensor]:
    """The tensors of one block's experts; the router is float32, since rounding it would change whom it chooses."""
    result = [
        Tensor(f"{path}gate.weight", (sizes.count, hidden), "F32"),
        Tensor(f"{path}shared_expert_gate.weight", (1, hidden), dtype),
    ]
    widths = {"shared_expert": sizes.shared, **{f"experts.{e}": sizes.size for e in range(sizes.count)}}
    for expert, width in widths.items():
        result += [Tensor(f"{path}{expert}.{part}.weight", (width, hidden), dtype) for part in ("gate_proj", "up_proj")]
        result.append(Tensor(f"{path}{expert}.down_proj.weight", (hidden, width), dtype))
    return result


def _config(spec: Spec, sizes: ExpertSizes, dense: Collection[int]) -> dict[str, Any]:
    """The config. Router weights add up to 1, and training adds no loss for the balance of experts."""
    mapped, source = model_map(spec), SOURCES[spec.structure.model_type]
    name = spec.structure.class_name or f"{source.prefix}Model"
    windows = current_windows(spec)
    sliding = next((window for window in windows if window is not None), None)
    given = {**source.defaults, **spec.structure.config}
    return {
        **{key: value for key, value in given.items() if key not in _REPLACED},
        "model_type": TARGET,
        "architectures": [_PREFIX + name.removeprefix(source.prefix)],
        "head_dim": mapped.head_dim,
        "num_key_value_heads": mapped.kv_heads,
        "rope_parameters": rope_parameters(spec.structure.config, source.theta),
        "qkv_bias": any(n.endswith("q_proj.bias") for n in spec.tensors),
        "use_sliding_window": sliding is not None,
        "sliding_window": sliding,
        "max_window_layers": mapped.depth,
        "layer_types": [FULL if window is None else SLIDING for window in windows],
        "num_experts": sizes.count,
        "num_experts_per_tok": sizes.active,
        "moe_intermediate_size": sizes.size,
        "shared_expert_intermediate_size": sizes.shared,
        "norm_topk_prob": True,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
        "decoder_sparse_step": 1,
        "mlp_only_layers": sorted(dense),
    }
