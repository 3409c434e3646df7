"""Records for models whose family has no written one.

The class that a config names is built on the meta device, without weights. transformers' own rules of loading say which of
its parameters each tensor of the files becomes, and the module of the parameter says what the tensor is. Where there is no
class, names and shapes alone are read (`shapes`). torch and transformers are imported when a record is asked for.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from compress.architectures.inference.shapes import by_shapes
from compress.architectures.inferred import Inferred, starred
from compress.errors import is_lack
from compress.spec.spec import Spec

if TYPE_CHECKING:
    from compress.architectures.inference.skeleton import Skeleton

__all__ = ["infer", "misfit"]
_KEPT = 32


class _Key:
    """A spec as a key, compared by its config and the names and shapes of its tensors."""

    __slots__ = ("_key", "spec")

    def __init__(self, spec: Spec) -> None:
        from compress.architectures.inference.skeleton import config_key

        self.spec = spec
        self._key = (config_key(spec.structure), tuple((t.name, t.shape, t.alias_of) for t in spec.tensors.values()))

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other._key == self._key


@lru_cache(maxsize=_KEPT)
def _inferred(key: _Key) -> Inferred:
    from compress.architectures.inference.read import by_class
    from compress.architectures.inference.skeleton import skeleton_of

    skeleton, reason = skeleton_of(key.spec.structure)
    if skeleton is None:
        return by_shapes(key.spec, reason)
    try:
        return by_class(key.spec, skeleton)
    except Exception as error:  # classes and configs differ in anything
        if is_lack(error):
            raise
        return by_shapes(key.spec, f"its class cannot be read ({type(error).__name__})")


def infer(spec: Spec) -> Inferred:
    """The record of a model, read off its class; by names and shapes where there is no class. The same for the same spec."""
    return _inferred(_Key(spec))


def misfit(spec: Spec, before: Spec) -> str | None:
    """The first disagreement between tensors and the class that the config builds, in words; None where they agree.

    Shapes of tensors that transformers joins or turns while it loads are not compared.

    Args:
        before: the model that ``spec`` was made from. Parameters that its files leave out too are no disagreement.
    """
    from compress.architectures.inference.skeleton import skeleton_of

    skeleton, reason = skeleton_of(spec.structure)
    if skeleton is None:
        return reason
    for tensor in spec.stored():
        target, whole = skeleton.loaded_as(tensor.name) or (None, None)
        if target is None:
            if tensor.name not in skeleton.ties and not skeleton.ignores(tensor.name):
                return f"its class has no place for {tensor.name}"
        elif target == whole and (expected := tuple(skeleton.state[target].shape)) != tensor.shape:
            return f"{tensor.name} is {list(tensor.shape)}, and its class expects {list(expected)}"
    original, _ = skeleton_of(before.structure)
    known = set() if original is None else {starred(name) for name in _unread(original, before)}
    unread = next((name for name in _unread(skeleton, spec) if starred(name) not in known), None)
    return None if unread is None else f"its class also has {unread}"


def _unread(skeleton: Skeleton, spec: Spec) -> list[str]:
    """Parameters that no tensor of the files becomes, tied ones aside."""
    read = {loaded[0] for tensor in spec.stored() if (loaded := skeleton.loaded_as(tensor.name)) is not None}
    tied = skeleton.ties.keys() | set(skeleton.ties.values())
    return [name for name in skeleton.state if name not in read and name not in tied]
