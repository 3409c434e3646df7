"""Checks of a config before it is used: types of the fields that are read, and sizes against the headers. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from compress.errors import CheckpointError
from compress.spec.spec import Spec

#: Limits beyond any real config. transformers and JSON writers break on deeper nesting and larger numbers.
_DEEPEST = 64
_LARGEST = 1 << 63
#: Number of blocks or experts that a config may have whatever the files hold; building so many empty ones takes a second.
_BLOCKS = 256
#: Number of labels that a config may have although no tensor has as many rows; each gets a name.
_LABELS = 100_000
_COUNT_OF_MODULES = re.compile(r"(layer|block|expert|depth|group)s?(_|$)|^layers|layers$")
_NO_COUNT = re.compile(
    r"(size|dim|rank|ids?|index|vocab|per_tok|per_group|norm|scale|window|max_window_layers|width|length|epsilon|eps)(_|$)"
)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


_Fields: TypeAlias = Mapping[str, tuple[str, Callable[[Any], bool]]]
#: Config fields that this package reads for any family ▶ their type in words, and a test of it.
_FIELDS: _Fields = {
    "architectures": ("a list of class names", _names),
    "dtype": ("the name of a number format", lambda v: isinstance(v, (str, dict))),
    "torch_dtype": ("the name of a number format", lambda v: isinstance(v, (str, dict))),
    "tie_word_embeddings": ("true or false", lambda v: isinstance(v, bool)),
    "vocab_size": ("a number of tokens", lambda v: _is_integer(v) and v > 0),
    "num_labels": ("a number of labels", lambda v: _is_integer(v) and v >= 0),
    "id2label": ("names of labels by number", _is_object),
    "label2id": ("numbers of labels by name", _is_object),
    "problem_type": ("a word", lambda v: isinstance(v, str)),
    "pad_token_id": ("a token id", _is_integer),
    "sliding_window": ("a number of tokens", _is_integer),
    "sliding_window_pattern": ("a number of blocks", lambda v: _is_integer(v) and v > 0),
    "max_window_layers": ("a number of blocks", _is_integer),
    "decoder_sparse_step": ("a number of blocks", lambda v: _is_integer(v) and v > 0),
    "mlp_only_layers": ("a list of blocks' numbers", lambda v: isinstance(v, list) and all(map(_is_integer, v))),
    "rope_scaling": ("an object", _is_object),
    "rope_parameters": ("an object", _is_object),
    "partial_rotary_factor": ("a number", lambda v: isinstance(v, (int, float)) and not isinstance(v, bool)),
    "quantization_config": ("an object", _is_object),
}
_SCHEMES = ("weights", "input_activations", "output_activations")
#: The same for ``quantization_config``, for a group in it, and for a scheme of weights, inputs or cache.
_QUANTIZATION: _Fields = {
    "config_groups": ("an object", _is_object),
    "ignore": ("a list of names", _names),
    "kv_cache_scheme": ("an object", _is_object),
    "format": ("a word", lambda v: isinstance(v, str)),
}
_GROUP: _Fields = {
    "targets": ("a list of names", _names),
    "format": ("a word", lambda v: isinstance(v, str)),
    **dict.fromkeys(_SCHEMES, ("an object", _is_object)),
}
_SCHEME: _Fields = {
    "num_bits": ("a number of bits", lambda v: _is_integer(v) and 0 < v <= 64),
    "group_size": ("a number of inputs", lambda v: _is_integer(v)),
    "strategy": ("a word", lambda v: isinstance(v, str)),
    "type": ("a word", lambda v: isinstance(v, str)),
}


def check_fields(config: Mapping[str, Any], where: str) -> None:
    """Check the types of the fields that are read, and that the config can be written as JSON.

    Raises:
        CheckpointError: names the field.
    """
    for path, value in _leaves(config, (), where):
        text = [*path, value] if isinstance(value, str) else path
        if any("\ud800" <= c <= "\udfff" for part in text for c in part):
            raise CheckpointError(f"`{_dotted(path)}` holds half a surrogate pair, which is not text", where=where)
        if isinstance(value, int) and abs(value) >= _LARGEST:
            raise CheckpointError(f"`{_dotted(path)}` is a number with {len(str(abs(value)))} digits", where=where)
    _check(config, _FIELDS, "", where)
    if (quantization := config.get("quantization_config")) is None:
        return
    _check(quantization, _QUANTIZATION, "quantization_config.", where)
    for name, group in (quantization.get("config_groups") or {}).items():
        _check(
            quantization["config_groups"],
            {name: ("an object", _is_object)},
            "quantization_config.config_groups.",
            where,
        )
        if group is None:
            raise CheckpointError(f"`quantization_config.config_groups.{name}` is empty", where=where)
        for part, fields in ((group, _GROUP), *((group.get(key) or {}, _SCHEME) for key in _SCHEMES)):
            _check(part, fields, f"quantization_config.config_groups.{name}.", where)
    _check(quantization.get("kv_cache_scheme") or {}, _SCHEME, "quantization_config.kv_cache_scheme.", where)


def _check(data: Mapping[str, Any], fields: _Fields, before: str, where: str) -> None:
    for key, (what, fits) in fields.items():
        if (value := data.get(key)) is not None and not fits(value):
            raise CheckpointError(f"`{before}{key}` is {_shown(value)}, not {what}", where=where)


def check_sizes(spec: Spec, where: str) -> None:
    """Check that the config has no more blocks, experts or labels than the tensors of the files could belong to.

    Otherwise a model of that size would be built, module by module, before it is compared with the files.

    Raises:
        CheckpointError: names the field.
    """
    tensors = len(spec.tensors)
    longest = max((size for tensor in spec.tensors.values() for size in tensor.shape), default=0)
    for path, value in _leaves(spec.structure.config, (), where):
        if not _is_integer(value) or value <= _BLOCKS:
            continue
        key = path[-1]
        if key == "num_labels" and value > max(longest, _LABELS):
            raise CheckpointError(
                f"config and weights disagree: `{_dotted(path)}` is {value}, but no tensor has as many rows",
                where=where,
            )
        counts = _COUNT_OF_MODULES.search(key) is not None and _NO_COUNT.search(key) is None
        if counts and value > max(tensors, _BLOCKS):
            raise CheckpointError(
                f"config and weights disagree: `{_dotted(path)}` is {value}, but the files have {tensors} tensors",
                where=where,
            )


def outgrown(spec: Spec) -> bool:
    """Whether the config has a size beyond those of all tensors, so that shapes must be compared before memory is allocated."""
    longest = max((size for tensor in spec.tensors.values() for size in tensor.shape), default=0)
    sizes = (value for path, value in _leaves(spec.structure.config, (), "") if "theta" not in "".join(path[-1:]))
    return any(_is_integer(value) and value > max(4 * longest, 1 << 16) for value in sizes)


def largest_number(data: Any, word: str) -> int:
    """Largest integer under a key that contains ``word``; 0 without any."""
    numbers = [v for path, v in _leaves(data, (), "") if _is_integer(v) and any(word in part for part in path)]
    return max(numbers, default=0)


def _leaves(value: Any, path: tuple[str, ...], where: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of every JSON leaf; empty objects and lists count as leaves."""
    if len(path) > _DEEPEST:
        raise CheckpointError(f"`{_dotted(path[:3])}` is nested more than {_DEEPEST} levels deep", where=where)
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, str(key)), where)
    elif isinstance(value, (list, tuple)) and value:
        for number, inner in enumerate(value):
            yield from _leaves(inner, (*path, str(number)), where)
    else:
        yield path, value


def _dotted(path: tuple[str, ...]) -> str:
    return ".".join(part[:40] for part in path)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
