"""Conversions of the configuration: dotted keys, overrides, JSON, a digest."""

import difflib
import hashlib
import json
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter

from efae.config import AnyConfig, Config, GeneratorConfig

_Kind = TypeVar("_Kind", Config, GeneratorConfig)

_RENAMED = {"training.look_images": "training.validation_images"}
"""Keys of release 0.1 that the next release still accepts, and their new names."""
_RUN_KEYS = ("tracking.", "ray.", "resume", "output")
_MACHINE_KEYS = (
    *("data.cache_bytes", "data.cache_dir", "data.pixel_cache_bytes", "data.decode_threads"),
    "data.tokenizer",
    # They change rounding, or measurements, alone.
    *("training.micro_batch_size", "training.activation_memory", "training.compile"),
    *("training.evaluation_precision", "training.profile_steps", "flow.sampler_steps"),
)


def with_overrides(config: _Kind, overrides: Mapping[str, Any]) -> _Kind:
    """Return `config` with dotted keys replaced, e.g. ``{"optimizer.learning_rate": 3e-4}``.

    Raises:
        ValueError: A key does not exist (the message names the nearest one), or a value is not
            allowed.
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
    return cast(_Kind, parse_run(tree))


def rename_options(arguments: Sequence[str]) -> list[str]:
    """Replace renamed options of the previous release, with a warning."""
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
            f"{key} was renamed to {new}; the next release removes the old name",
            FutureWarning,
            stacklevel=3,
        )
    return new


def flatten(config: AnyConfig) -> dict[str, Any]:
    """Return the tree as dotted keys, in the order of its fields."""
    return dict(_flatten(config, ""))


def _flatten(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for entry in fields(node):
        value = getattr(node, entry.name)
        if is_dataclass(value):
            yield from _flatten(value, f"{prefix}{entry.name}.")
        else:
            yield f"{prefix}{entry.name}", value


def list_changes(before: AnyConfig, now: AnyConfig) -> list[tuple[str, str]]:
    """Return every key whose value differs, with a text such as "model.depth: 4 -> 5"."""
    old, new = flatten(before), flatten(now)
    return [(key, f"{key}: {old[key]!r} -> {new[key]!r}") for key in new if old[key] != new[key]]


def write_option(key: str, value: Any) -> str:
    """Return a setting as an option of the command line, quoted for a shell."""
    section, _, last = key.replace("_", "-").rpartition(".")
    prefix = f"--{section}." if section else "--"
    if isinstance(value, bool):
        return f"{prefix}{'' if value else 'no-'}{last}"
    return " ".join([f"{prefix}{last}", *map(shlex.quote, _list_words(value))])


def _list_words(value: Any) -> list[str]:
    if isinstance(value, list | tuple):
        return [word for entry in cast(Sequence[Any], value) for word in _list_words(entry)]
    return [str(value)]


def from_dict(tree: Mapping[str, Any]) -> Config:
    """Return the configuration of a nested dictionary, as ``dataclasses.asdict`` makes it.

    Values are validated, and unknown keys refused.
    """
    for old, new in _RENAMED.items():  # files written by the previous release
        (section, before), after = old.split("."), new.rpartition(".")[2]
        if before in tree.get(section, {}):
            values = dict(tree[section])
            tree = {**tree, section: {after: values.pop(before), **values}}
    return TypeAdapter(Config).validate_python(tree)


def parse_run(tree: Mapping[str, Any]) -> AnyConfig:
    """Return the configuration of a run of either kind, as `from_dict` does."""
    if "generator" in tree:
        return TypeAdapter(GeneratorConfig).validate_python(tree)
    return from_dict(tree)


def to_json(config: AnyConfig) -> str:
    """Return the resolved configuration as indented JSON, in the order of its fields."""
    return json.dumps(asdict(config), indent=2)


def from_json(text: str) -> Config:
    """Return the configuration of a tokenizer that `to_json` wrote."""
    return from_dict(json.loads(text))


def decides_weights(key: str) -> bool:
    """Return whether this setting influences the weights; names, places and caches do not."""
    return not key.startswith(_RUN_KEYS) and key not in _MACHINE_KEYS


def binds_run(key: str) -> bool:
    """Return whether an unfinished run must keep this setting."""
    written = ("training.checkpoint_interval", "training.log_interval", "training.held_out_images")
    return decides_weights(key) and key not in written


def digest(config: AnyConfig) -> str:
    """Return a hash of all settings that influence the weights."""
    decisive = {key: value for key, value in flatten(config).items() if decides_weights(key)}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
