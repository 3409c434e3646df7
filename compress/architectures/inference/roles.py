"""The role of every matrix of a model: by the kind of the module that holds it, then by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from compress.architectures.inferred import BlockList, Matrix, OuterRole, starred
from compress.architectures.record import BlockRole
from compress.spec.spec import Spec

if TYPE_CHECKING:
    from compress.architectures.inference.skeleton import Skeleton

#: Words of paths that hold attention, and MLPs or experts.
_ATTENTION = re.compile(r"attn|attention|mixer|mamba|ssm|conv|recurrent|linear_att|delta", re.IGNORECASE)
_SELF = re.compile(r"attn|attention|^qkv|^[qkvo]_proj$", re.IGNORECASE)
_MLP = re.compile(
    r"mlp|ffn|feed_forward|feedforward|expert|moe|^fc\d$|^wi|^wo$|dense_h_to|dense_4h|intermediate|lin[12]$",
    re.IGNORECASE,
)
#: Kinds of modules whose weights are kernels; axes of a kernel that runs along one axis, of sound or text.
_KERNELS, _AXES_OF_SOUND = ("conv", "depthwise"), 3
#: Names of modules that choose experts.
ROUTER = re.compile(r"(?:^|\.)(?:\w*router\w*|gate|wg|shared_expert_gate|gate_network)(?:\.\w+)?$", re.IGNORECASE)


def matrices_of(
    spec: Spec,
    skeleton: Skeleton,
    targets: Mapping[str, str],
    lists: Sequence[BlockList],
    embeddings: Collection[str],
    head: str | None,
) -> dict[str, Matrix]:
    """Tensor of two axes or more ▶ what it is; ``*`` stands for numbers. Kernels that differ by block have whole names.

    Args:
        targets: tensor ▶ parameter. embeddings: modules in files that embed. head: module in memory that predicts.
    """
    result: dict[str, Matrix] = {}
    kernels: dict[str, Matrix] = {}
    loose, stages = not lists, _stages(lists)
    for tensor in spec.tensors.values():
        if len(tensor.shape) < 2 or tensor.name not in targets:
            continue
        target = targets[tensor.name]
        inside = next((entry for entry in lists if target.startswith(f"{entry.module}.")), None)
        if inside is None:
            between = target.startswith(stages)
            matrix = _outside(skeleton, tensor.module, target, embeddings, head, loose or between)
        else:
            part = target[len(inside.module) + 1 :].partition(".")[2]
            matrix = _inside(skeleton, target, part, tensor.shape)
        key = starred(tensor.name)
        result[key] = matrix if result.get(key, matrix) == matrix else _least(result[key], matrix)
        if matrix.kernel:
            kernels[tensor.name] = matrix
    # depthwise and other convolutions may alternate in one list
    return result | {name: matrix for name, matrix in kernels.items() if result[starred(name)] != matrix}


def _stages(lists: Sequence[BlockList]) -> tuple[str, ...]:
    """Paths in memory, with the dot, of the lists of stages that have lists of blocks.

    What is below them and in no block lies between the stages, such as the layers that merge patches.
    """
    paths = (entry.module.split(".") for entry in lists if entry.kind != "tower")
    places = ((path, next((i for i, part in enumerate(path) if part.isdigit()), None)) for path in paths)
    return tuple({".".join([*path[:place], ""]) for path, place in places if place is not None})


def _least(a: Matrix, b: Matrix) -> Matrix:
    """The safer one of two, where tensors of the same name differ by block."""
    routers = [m for m in (a, b) if m.role == "router"]
    alike = a.transposed == b.transposed and a.kernel == b.kernel
    return (
        routers[0] if routers else Matrix("other", a.layer and b.layer and alike, a.transposed, a.kernel and b.kernel)
    )


def kind_of(module: Any) -> str:
    """Kind of a module: ``linear``, ``transposed`` (a linear layer that is stored [I, O]), ``table``, ``conv``, ``depthwise``
    (a convolution of each channel by itself) or ``other``.

    A module of a class of its own that says how many features its matrix [O, I] takes and gives is a linear layer too.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return "transposed"
    if isinstance(module, torch.nn.Linear):
        return "linear"
    if isinstance(module, torch.nn.Embedding):
        return "table"
    if isinstance(module, torch.nn.modules.conv._ConvNd) and not module.transposed:
        return "depthwise" if module.groups > 1 and module.groups == module.in_channels else "conv"
    features = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    return "linear" if tuple(getattr(getattr(module, "weight", None), "shape", ())) == features else "other"


def _outside(
    skeleton: Skeleton, module: str, target: str, embeddings: Collection[str], head: str | None, loose: bool
) -> Matrix:
    role: OuterRole = "other"
    owner = target.rpartition(".")[0]
    kind = kind_of(skeleton.modules.get(owner))
    if owner == head or (
        head is not None and skeleton.ties.get(f"{head}.weight") == target and module not in embeddings
    ):
        role = "head"
    elif module in embeddings:
        role = "embedding"
    weight = target.endswith(".weight")
    layer = loose and role == "other" and kind in ("linear", "transposed", "conv") and weight
    layer = layer and owner not in (_last(skeleton), _stem(skeleton))
    return Matrix(role, layer, kind == "transposed", weight and kind in _KERNELS)


def _last(skeleton: Skeleton) -> str | None:
    """A classifier's last layer: nothing of the model comes after it."""
    linears = (name for name, module in skeleton.modules.items() if kind_of(module) in ("linear", "transposed"))
    return next(iter([*linears][::-1]), None)


def _stem(skeleton: Skeleton) -> str | None:
    """The first convolution, which reads pixels or sound: it has few weights, and all that follows depends on it."""
    return next((name for name, module in skeleton.modules.items() if kind_of(module) in _KERNELS), None)


def _inside(skeleton: Skeleton, target: str, part: str, shape: Sequence[int]) -> Matrix:
    """A matrix of a block; ``part``: the parameter's path below its block."""
    owner, _, name = target.rpartition(".")
    module = skeleton.modules.get(owner)
    kind, path = kind_of(module), part.rpartition(".")[0]
    fused = getattr(module, name, None)
    if is_router(path, module, _experts(skeleton.config)):
        return Matrix("router", False, kind == "transposed")
    if kind == "table":
        return Matrix("distances")
    role = role_of(path or part)
    if kind in ("linear", "transposed") and name == "weight":
        parent, _, child = owner.rpartition(".")
        by_hand = child in _multiplied_by_hand(skeleton.modules[parent].__class__)
        return Matrix(role, not by_hand, kind == "transposed")
    if kind in _KERNELS and name == "weight":
        if role == "attention" and not _SELF.search(path):  # by the word `conv` alone, as in networks for images
            role = "other" if len(shape) > _AXES_OF_SOUND else role
        return Matrix(role, kind == "conv" and owner != _stem(skeleton), False, True)
    if fused is not None and fused.ndim == 3 and len(shape) == 2:  # an expert of a fused tensor, by itself in the files
        return Matrix("mlp", True)
    if fused is not None and fused.ndim == len(shape) == 3 and (turned := inputs_first(module)) is not None:
        same = tuple(shape) == tuple(fused.shape)
        if same or tuple(shape) == tuple(fused.mT.shape):
            return Matrix("mlp", True, turned == same)
    return Matrix(role)


def inputs_first(module: Any) -> bool | None:
    """Whether a module's tensors of all experts are [E, I, O] in memory, not [E, O, I]; None where it has no such tensors."""
    weights: list[Any] = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    if any(getattr(weight, "ndim", 0) != 3 for weight in weights):
        return None
    both, down = weights
    if len(both) != len(down):
        return None
    turned = both.shape[1] == down.shape[2] and both.shape[2] == 2 * down.shape[1]
    straight = both.shape[2] == down.shape[1] and both.shape[1] == 2 * down.shape[2]
    if turned and straight:
        return bool(getattr(module, "is_transposed", False))
    return turned if turned or straight else None


@cache
def _multiplied_by_hand(cls: Any) -> frozenset[str]:
    """Layers of a module class whose weights its code multiplies itself, without a call of the layer, as Mamba's ``dt_proj``.

    Calibration sees no inputs of these, and codes in their place would not be decoded.
    """
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        return frozenset()
    patterns = (
        r"self\.(\w+)\.weight\s*@",
        r"@\s*self\.(\w+)\.weight\b",
        r"linear\((?:[^(),]|\([^()]*\))+,\s*self\.(\w+)\.weight\b",
    )
    return frozenset(name for pattern in patterns for name in re.findall(pattern, source))


def is_router(path: str, module: Any, experts: Collection[int]) -> bool:
    """Whether a module of a block chooses experts, or weighs one that all tokens use."""
    if re.search(r"experts?\.\d", path):
        return False
    weight = getattr(module, "weight", None)
    outputs = int(weight.shape[0]) if weight is not None and weight.ndim == 2 else 0
    kind = type(module).__name__
    if re.search(r"router|topk", kind, re.IGNORECASE) or (re.search(r"gate$", kind, re.IGNORECASE) and outputs):
        return True
    return ROUTER.search(path) is not None and outputs in {*experts, 1}


def _experts(config: Any) -> set[int]:
    """Numbers of experts that a config, or one inside it, names."""
    result: set[int] = set()
    for key, value in vars(config).items():
        if hasattr(value, "to_dict"):
            result |= _experts(value)
        elif "expert" in key and type(value) is int:
            result.add(value)
    return result


def role_of(part: str) -> BlockRole:
    """The role of a matrix of a block by its path below the block, innermost words first."""
    for word in reversed(part.split(".")):
        if _MLP.search(word):
            return "mlp"
        if _SELF.search(word) or _ATTENTION.search(word):
            return "attention"
    return "mlp" if part.partition(".")[0] == "output" else "other"  # beside `intermediate`


def experts_in(
    spec: Spec,
    targets: Mapping[str, str],
    skeleton: Skeleton,
    lists: Sequence[BlockList],
    matrices: Mapping[str, Matrix],
) -> tuple[str, ...]:
    """Modules inside a block that hold numbered experts in the files, or tensors of all experts."""
    result: dict[str, None] = {}
    for name, target in targets.items():
        entry = next((e for e in lists if name.startswith(f"{e.path}.")), None)
        if entry is None or len(spec.tensors[name].shape) < 2:
            continue
        part = name[len(entry.path) + 1 :].partition(".")[2]
        words = part.split(".")
        place = next((i for i, word in enumerate(words) if word.isdigit()), None)
        matrix = matrices[starred(name)]
        if place is None and len(spec.tensors[name].shape) == 3 and matrix.layer and not matrix.kernel:
            result[part.rpartition(".")[0]] = None
        elif place and (
            "expert" in words[place - 1] or skeleton.state[target].ndim == len(spec.tensors[name].shape) + 1
        ):
            result[".".join(words[:place])] = None
    return tuple(result)


def parts_of(role: str, matrices: Mapping[str, Matrix], lists: Sequence[BlockList]) -> tuple[str, ...]:
    """Modules below a block with a role, in files."""
    result: dict[str, None] = {}
    for name, matrix in matrices.items():
        entry = next((e for e in lists if name.startswith(f"{starred(e.path)}.*.")), None)
        if entry is not None and matrix.role == role:
            result[name[len(starred(entry.path)) + 3 :].rpartition(".")[0]] = None
    return tuple(filter(None, result))
