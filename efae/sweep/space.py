"""The search space of a sweep: dotted configuration keys, each with its possible values.

Beside the configuration's own keys there are the five names representation.multiplicities.a1 to .e.
Those that are searched fill representation.multiplicities; one of a1 to b2 may be left out, and
then takes the remaining channels.
"""

import difflib
import itertools
import math
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from efae.config import Config
from efae.config import forms as configuration
from efae.config.forms import with_overrides
from efae.model.representation import check_model
from efae.symmetry.representation import IRREPS

_MULTIPLICITIES = "representation.multiplicities"
_MOST_COMBINATIONS = 10_000
"""Maximum number of combinations to enumerate."""
_SAME = (
    *("data.", "ray.", "tracking.", "resume", "training.steps", "training.seed"),
    *("start.model", "start.action", "start.architecture"),  # read once, before the trials
)
"""Keys that trials must share to be comparable."""


@dataclass(frozen=True)
class Space:
    """Dotted keys and their distributions.

    Attributes:
        distributions: Optuna distributions by key.
    """

    distributions: Mapping[str, BaseDistribution]

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return the space as its file would define it, see `read_space`."""
        described: dict[str, dict[str, Any]] = {}
        for key, distribution in self.distributions.items():
            if isinstance(distribution, CategoricalDistribution):
                described[key] = {"choices": list(distribution.choices)}
            else:
                range_ = cast(Any, distribution)
                described[key] = {"low": range_.low, "high": range_.high, "log": range_.log}
                if range_.step is not None:
                    described[key]["step"] = range_.step
        return described

    @property
    def is_finite(self) -> bool:
        """Whether all its combinations can be enumerated."""
        counts = [_list_values(distribution) for distribution in self.distributions.values()]
        return None not in counts and math.prod(len(c) for c in counts if c) <= _MOST_COMBINATIONS

    @property
    def combinations(self) -> Iterator[dict[str, Any]]:
        """All combinations in order; of an infinite space only some."""
        values = [_list_values(d) or [cast(Any, d).low] for d in self.distributions.values()]
        for chosen in itertools.islice(itertools.product(*values), _MOST_COMBINATIONS):
            yield dict(zip(self.distributions, chosen, strict=True))


def _list_values(distribution: BaseDistribution) -> list[Any] | None:
    """Return all values in order; None if they are infinitely many."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    range_ = cast(Any, distribution)
    if range_.step is None or range_.log:
        return None
    count = round((range_.high - range_.low) / range_.step) + 1
    # Optuna rounds and clips in the same way: 3 * 0.1 exceeds 0.3.
    return [min(range_.low + i * range_.step, range_.high) for i in range(count)]


def _contains(distribution: BaseDistribution, value: Any) -> bool:
    values = _list_values(distribution)
    if values is not None:
        return value in values
    range_ = cast(Any, distribution)
    return isinstance(value, int | float) and range_.low <= value <= range_.high


@dataclass
class Chooser:
    """Accepts combinations that are feasible and new.

    Attributes:
        config: Configuration that every trial starts from.
        space: Search space.
        seen: Signatures of the accepted combinations.
        refused: Reasons why others are infeasible, by their values.
    """

    config: Config
    space: Space
    seen: set[str] = field(default_factory=set[str])
    refused: dict[str, str] = field(default_factory=dict[str, str])

    def accept(self, combination: Mapping[str, Any]) -> bool:
        """Return whether the combination is feasible and new, and remember it."""
        signature = self.sign(combination)
        if signature is None or signature in self.seen:
            return False
        self.seen.add(signature)
        return True

    def sign(self, combination: Mapping[str, Any]) -> str | None:
        """Return a signature, equal for combinations of the same model; None if infeasible."""
        try:
            config = apply_combination(self.config, combination)
            representation = check_model(config)
        except ValueError as error:
            self.refused[str(combination)] = str(error)
            return None
        same = {
            _MULTIPLICITIES: tuple(representation.multiplicities.values()),
            "representation.rotation_dims": None,
            "representation.chirality_split": None,
        }
        return configuration.digest(with_overrides(config, same))

    def place(self, multiplicities: Mapping[str, int]) -> dict[str, Any] | None:
        """Return the combination of a split and the configuration's own other settings.

        Of a space of `rotation_dims` and `chirality_split`, it is the one with as many channels
        that rotate and that change sign.

        Returns:
            Combination; None if the space searches no splits or does not contain this one, or if
            it is infeasible.
        """
        representation = self.config.representation
        others = representation.dim - 2 * multiplicities["e"]
        split = {f"{_MULTIPLICITIES}.{irrep}": n for irrep, n in multiplicities.items()} | {
            "representation.rotation_dims": 2 * multiplicities["e"],
            "representation.chirality_split": 1 - multiplicities["a1"] / max(1, others),
        }
        if not set(split) & set(self.space.distributions):
            return None
        wanted = configuration.flatten(self.config) | split
        combination = {key: wanted[key] for key in self.space.distributions}
        for key, distribution in self.space.distributions.items():
            if not _contains(distribution, combination[key]):
                return None
        try:
            found = check_model(apply_combination(self.config, combination)).multiplicities
        except ValueError:
            return None
        same = all(found[irrep] == multiplicities[irrep] for irrep in ("a1", "e"))
        return combination if same else None

    def list_possible(self) -> list[dict[str, Any]] | None:
        """Return one combination for each different model; None for an infinite space.

        Raises:
            ValueError: No combination is feasible; the message explains one of them.
        """
        possible: dict[str, dict[str, Any]] = {}
        for combination in self.space.combinations:
            if signature := self.sign(combination):
                possible.setdefault(signature, combination)
                if not self.space.is_finite:
                    return None
        if not possible:
            combination, reason = next(iter(self.refused.items()))
            raise ValueError(
                f"sweep.space: none of its combinations is feasible ({len(self.refused)} were"
                f" tried), for instance {combination}: {reason}"
            )
        return list(possible.values())


def apply_combination(config: Config, combination: Mapping[str, Any]) -> Config:
    """Return the configuration with one combination's values.

    Raises:
        ValueError: A value is not allowed.
    """
    return with_overrides(config, list_overrides(combination, config.representation.dim))


def list_overrides(combination: Mapping[str, Any], dim: int) -> dict[str, Any]:
    """Return a combination as values by key of the configuration.

    Args:
        combination: Values by key of the space.
        dim: Number of latent channels, unless the combination has it.

    Raises:
        ValueError: The multiplicities exceed the channels.
    """
    overrides = {k: v for k, v in combination.items() if not k.startswith(f"{_MULTIPLICITIES}.")}
    counts = {
        k.rpartition(".")[2]: v
        for k, v in combination.items()
        if k.startswith(f"{_MULTIPLICITIES}.")
    }
    if counts:
        dim = combination.get("representation.dim", dim)
        missing = [irrep for irrep in IRREPS if irrep not in counts]
        taken = sum(count * (2 if irrep == "e" else 1) for irrep, count in counts.items())
        if missing:
            counts[missing[0]] = dim - taken
        chosen = tuple(counts[irrep] for irrep in IRREPS)
        if min(chosen) < 0:
            raise ValueError(f"more than representation.dim={dim}: {counts}")
        overrides[_MULTIPLICITIES] = chosen
    return overrides


def count_latent(config: Config) -> int:
    """Return how many numbers the latent of one image has."""
    height, width = (side // config.model.downsampling for side in config.data.image_size)
    return config.representation.dim * height * width


def read_space(source: str, config: Config) -> Space:
    """Return the space of this name, or of this file.

    Args:
        source: Name "split", "split_and_rate", "multiplicities", or TOML file with lines such as
            "optimizer.learning_rate" = {low = 1e-3, high = 1e-2, log = true},
            "representation.rotation_dims" = {low = 0, high = 16, step = 4} and
            "model.level" = {choices = ["exact", "objective"]}.
        config: Configuration that every trial starts from.

    Raises:
        ValueError: There is no such space or file, or one of its lines is invalid; the message
            names it.
    """
    if source in NAMED_SPACES:
        table = NAMED_SPACES[source](config)
    else:
        path = Path(source)
        if path.suffix != ".toml" or not path.is_file():
            raise ValueError(
                f"sweep.space={source!r}: neither a TOML file nor one of {', '.join(NAMED_SPACES)}"
            )
        try:
            table = tomllib.loads(path.read_text())
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"sweep.space={source}: {error}") from error
    table = _join_keys(table)
    known = [*configuration.flatten(config), *(f"{_MULTIPLICITIES}.{irrep}" for irrep in IRREPS)]
    if not table:
        raise ValueError(f"sweep.space={source}: it is empty")
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"sweep.space={source}: unknown configuration key {key!r}{hint}")
        if key.startswith(_SAME):
            raise ValueError(
                f"sweep.space={source}: {key!r} cannot be searched: trials are compared at the same"
                " data, steps, seed and resources"
            )
    counts = [key for key in table if key.startswith(f"{_MULTIPLICITIES}.")]
    if counts and (len(counts) < 4 or (len(counts) == 4 and f"{_MULTIPLICITIES}.e" not in table)):
        raise ValueError(
            f"sweep.space={source}: of {_MULTIPLICITIES}.a1, a2, b1, b2 and e, one of the first"
            " four may be left out (it takes the remaining channels); give the others"
        )
    return Space(
        {
            key: _read_values(source, key, values, _is_fraction(config, key))
            for key, values in table.items()
        }
    )


def _join_keys(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested tables: TOML parses a bare dotted key as tables in tables."""
    joined: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and not set(cast(Any, value)) & {"choices", "low", "high"}:
            joined |= _join_keys(cast(Mapping[str, Any], value), f"{name}.")
        else:
            joined[name] = value
    return joined


def _is_fraction(config: Config, key: str) -> bool:
    """Return whether the setting is a float, even if it is not set."""
    *sections, name = key.split(".")
    section: Any = config
    for part in sections:
        section = getattr(section, part)
    kind = get_type_hints(cast(type[Any], type(section))).get(name)
    return float in (kind, *get_args(kind))


def _read_values(source: str, key: str, values: Any, is_fraction: bool) -> BaseDistribution:
    given = cast(dict[str, Any], values if isinstance(values, dict) else {"choices": values})
    try:
        if set(given) == {"choices"}:
            return CategoricalDistribution(_check_choices(given["choices"]))
        low, high = given["low"], given["high"]
        rest = {name: given[name] for name in given if name not in ("low", "high")}
        whole = all(isinstance(number, int) for number in (low, high, rest.get("step", 1)))
        if whole and not is_fraction:
            return IntDistribution(low, high, **rest)
        return FloatDistribution(low, high, **rest)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"sweep.space={source}: {key} = {given}: {error}; write {{choices = [...]}}, or low"
            " and high, optionally with log = true or a step"
        ) from error


def _check_choices(choices: list[Any]) -> list[Any]:
    if not choices or any(isinstance(choice, list | Mapping) for choice in choices):
        raise TypeError("choices are numbers, texts, or true and false")
    return choices


def _list_splits(config: Config) -> dict[str, Any]:
    """Return the space of rotation_dims, in eighths of the channels, and split, in quarters."""
    dim = config.representation.dim
    step = max(2, 2 * round(dim / 16))
    return {
        "representation.rotation_dims": {"low": 0, "high": dim // step * step, "step": step},
        "representation.chirality_split": {"low": 0.0, "high": 0.75, "step": 0.25},
    }


def _list_rates(config: Config) -> dict[str, Any]:
    rate = config.optimizer.learning_rate
    return {"optimizer.learning_rate": {"low": rate / 4, "high": rate * 4, "log": True}}


def _list_multiplicities(config: Config) -> dict[str, Any]:
    dim = config.representation.dim
    step = max(1, dim // 16)
    table: dict[str, Any] = {
        f"{_MULTIPLICITIES}.{irrep}": {"low": 0, "high": dim // 4 // step * step, "step": step}
        for irrep in ("a2", "b1", "b2")
    }
    table[f"{_MULTIPLICITIES}.e"] = {"low": 0, "high": dim // 2 // step * step, "step": step}
    return table


NAMED_SPACES: dict[str, Callable[[Config], dict[str, Any]]] = {
    "split": _list_splits,
    "split_and_rate": lambda config: _list_splits(config) | _list_rates(config),
    "multiplicities": _list_multiplicities,
}
"""Functions from the configuration that every trial starts from to a space, by name."""
