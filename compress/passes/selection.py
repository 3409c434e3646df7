"""Modules that a pass works on: `select` and the patterns of ``only`` and ``skip``, matched in bounded time."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Collection, Iterable

from compress.architectures.model_map import Linear, model_map
from compress.checkpoint.patterns import Matcher, unsupported
from compress.errors import CheckpointError, PassError
from compress.passes.base import PassSettings
from compress.spec.spec import Spec

#: Most repeats and alternatives of an expression that Python's ``re`` matches, which is fast but backtracks.
_REPEATS, _ALTERNATIVES = 3, 8


def select(modules: Iterable[str], settings: PassSettings, universe: Iterable[str]) -> set[str]:
    """Modules that the pass works on.

    Args:
        modules: modules that it takes without ``only``.
        universe: all modules of the checkpoint, which ``only`` may name.

    Raises:
        PassError: a pattern is broken, or matches no module of the universe.
    """
    everything = dict.fromkeys(universe)
    only = [matching(pattern, everything, "only") for pattern in settings.only]
    skip = [matching(pattern, everything, "skip") for pattern in settings.skip]
    chosen = set[str]().union(*only) if only else set(modules)
    return chosen.difference(*skip)


def select_linears(
    spec: Spec, settings: PassSettings, default: Callable[[Linear], bool] = lambda linear: True
) -> set[str]:
    """Modules that the pass works on: linear layers of blocks, or any modules that ``only`` names.

    Args:
        default: whether the pass takes a linear layer without ``only``.

    Raises:
        PassError: a pattern matches no module; or the family has no record, and ``only`` is not given.
    """
    mapped = model_map(spec)
    taken = () if settings.only else [linear.module for linear in mapped.targets if default(linear)]
    return select(taken, settings, mapped.modules)


def matching(pattern: str, modules: Collection[str], key: str) -> set[str]:
    """Modules whose whole name matches a glob, or a regular expression after ``re:``.

    Args:
        key: the setting that holds the pattern, for errors.

    Raises:
        PassError: the pattern is broken, or matches no module.
    """
    test = _test(pattern, key) if pattern.startswith("re:") else lambda name: fnmatch.fnmatchcase(name, pattern)
    chosen = {module for module in modules if test(module)}
    if not chosen:
        near = difflib.get_close_matches(pattern.removeprefix("re:"), modules, n=1, cutoff=0.0)
        raise PassError(
            f"`{pattern}` matches no module",
            key=key,
            fix=f"the nearest is `{near[0]}`; `compress inspect` lists them" if near else None,
        )
    return chosen


def _test(pattern: str, key: str) -> Callable[[str], bool]:
    """A function that matches a regular expression against a whole name. Raises `PassError`."""
    try:
        expression = re.compile(pattern.removeprefix("re:"))
    except (re.error, RecursionError, OverflowError) as error:
        raise PassError(f"`{pattern}` is not a regular expression: {error}", key=key) from None
    if _is_fast(expression.pattern):
        return lambda name: expression.fullmatch(name) is not None
    if (reason := unsupported(pattern)) is not None:
        raise PassError(f"`{pattern}` could take very long to match: {reason}", key=key, fix="write a simpler pattern")
    matcher = Matcher(key, whole=True)

    def test(name: str) -> bool:
        try:
            return matcher.matches(pattern, name)
        except CheckpointError:
            raise PassError(f"`{pattern}` takes too long to match", key=key, fix="write a simpler pattern") from None

    return test


def _is_fast(text: str) -> bool:
    """Whether Python's ``re`` cannot backtrack long: few repeats and alternatives, and no repeated group."""
    repeats, alternatives = len(re.findall(r"[*+?{]", text)), text.count("|")
    return repeats <= _REPEATS and alternatives <= _ALTERNATIVES and re.search(r"\)[*+?{]", text) is None
