"""The configuration in its other forms: dotted keys, JSON, a digest, some keys replaced."""

import difflib
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from pydantic import TypeAdapter

from efae.config import Config

_RENAMED = {"training.look_images": "training.validation_images"}
"""Keys of release 0.1 that the next release still takes, and their new names."""
_OF_THE_RUN = ("tracking.", "ray.", "resume")
_OF_THE_MACHINES = (
    "data.cache_bytes",
    "data.cache_dir",
    "data.pixel_cache_bytes",
    "data.decode_threads",
)


def with_overrides(config: Config, overrides: Mapping[str, Any]) -> Config:
    """A copy of `config` with dotted keys replaced, e.g. ``{"optimizer.learning_rate": 3e-4}``.

    Raises:
        ValueError: a key that does not exist (the nearest one is named) or a value that is
            not allowed.
    """
    tree = asdict(config)
    for key, value in overrides.items():
        key = _rename(key)
        *sections, leaf = key.split(".")
        known = list(flatten(config))
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; the keys are {', '.join(known)}"
            raise ValueError(f"unknown configuration key {key!r}{hint}")
        branch = tree
        for section in sections:
            branch = branch[section]
        branch[leaf] = value
    return from_dict(tree)


def rename_options(arguments: Sequence[str]) -> list[str]:
    """Replace options of the earlier release by today's, with a warning."""
    renamed: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        key = name.removeprefix("--").replace("-", "_")
        if name.startswith("--") and key in _RENAMED:
            name = f"--{_rename(key).replace('_', '-')}"
        renamed.append(f"{name}{equals}{value}")
    return renamed


def _rename(key: str) -> str:
    new = _RENAMED.get(key, key)
    if new != key:
        warnings.warn(
            f"{key} is called {new} now; the old name ends with the next release",
            FutureWarning,
            stacklevel=3,
        )
    return new


def flatten(config: Config) -> dict[str, Any]:
    """The tree as dotted keys, in the order of its page."""
    return dict(_flatten(config, ""))


def _flatten(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for entry in fields(node):
        value = getattr(node, entry.name)
        if is_dataclass(value):
            yield from _flatten(value, f"{prefix}{entry.name}.")
        else:
            yield f"{prefix}{entry.name}", value


def from_dict(tree: Mapping[str, Any]) -> Config:
    """The inverse of ``dataclasses.asdict``; values are validated, unknown keys refused."""
    for old, new in _RENAMED.items():  # in files of an earlier release
        (section, before), after = old.split("."), new.rpartition(".")[2]
        if before in tree.get(section, {}):
            values = dict(tree[section])
            tree = {**tree, section: {after: values.pop(before), **values}}
    return TypeAdapter(Config).validate_python(tree)


def to_json(config: Config) -> str:
    """The resolved configuration as JSON, two-space indented, in the order of its page."""
    return json.dumps(asdict(config), indent=2)


def from_json(text: str) -> Config:
    """The inverse of `to_json`."""
    return from_dict(json.loads(text))


def decides_weights(key: str) -> bool:
    """Whether this setting has a part in the weights; names, places and caches have none."""
    return not key.startswith(_OF_THE_RUN) and key not in _OF_THE_MACHINES


def digest(config: Config) -> str:
    """A hash of every setting that `decides_weights`."""
    decisive = {key: value for key, value in flatten(config).items() if decides_weights(key)}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
