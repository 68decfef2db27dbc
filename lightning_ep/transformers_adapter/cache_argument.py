"""The cache that a forward is given. transformers 5.24 calls it ``cache``, 5.23 ``past_key_values``.

Both are read of every call, since 5.24 takes the old name, too, and renames it after hooks have seen it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

CACHE_NAMES = frozenset({"cache", "past_key_values"})
STATE_NAMES = CACHE_NAMES | {"cache_params"}
"""Those of layers of any kind, whose cache may be a state."""


def takes_cache(names: Iterable[str]) -> bool:
    """Whether a forward with parameters of these names can be given a cache."""
    return not CACHE_NAMES.isdisjoint(names)


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call by name; None if there is none."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def without_cache(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, where a cache was given with None in its place."""
    return {**arguments, **dict.fromkeys(CACHE_NAMES & arguments.keys())}
