"""Promotion of a version to an alias, if it passes gates on its tags and the present version's.

Autoencoders are compared by how they reconstruct held-out images, generators by the FID of their
samples. Numbers are compared as decimals, as the tags spell them: 24.1 is exactly 0.1 more than
24.0. A missing tag is unknown, and unknown never passes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Literal, get_args

from efae.symmetry import GROUPS
from efae.tracking.server import Server

if TYPE_CHECKING:
    from efae.registry.versions import RegisteredVersion

HIGHER_IS_BETTER = {
    "psnr": True,
    "ssim": True,
    "held_out_loss": False,
    "worst_gap_db": False,
    "encoder_error": False,
    "lpips": False,
    "fid": False,
}
GateName = Literal["lineage", "images", "metric", "gap"]
GATES: tuple[GateName, ...] = get_args(GateName)
_OVER_GROUP = ("worst_gap_db", "encoder_error")
"""Metrics that are the worst over the elements of a version's own group."""
_MEASURED = ("held_out_data", "held_out_images", "image_shape")
_SAMPLED = ("fid_reference", "fid_features", "fid_samples")
"""Tags that are equal where the FIDs of two generators compare; see `record_fid`."""


@dataclass(frozen=True)
class Terms:
    """Requirements on a version.

    Attributes:
        metric: Metric that must improve on the present version's; a key of `HIGHER_IS_BETTER`.
            None is psnr, or fid for a generator.
        margin: Margin that the improvement must exceed, in the metric's unit.
        gap_tolerance_db: Tolerance for a larger worst gap, which rounding causes, in dB.
        skip: Gates that need not pass.
    """

    metric: str | None = None
    margin: float = 0.0
    gap_tolerance_db: float = 1e-3
    skip: tuple[GateName, ...] = ()

    def __post_init__(self):
        for option, value in (("margin", self.margin), ("gap-tolerance", self.gap_tolerance_db)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"--{option} {value}: use a finite number, 0 or more")
        for gate in self.skip:
            if gate not in GATES:
                raise ValueError(f"--skip {gate}: the gates are {', '.join(GATES)}")


@dataclass(frozen=True)
class Contender:
    """What the gates need of a version: its URI and its tags."""

    uri: str
    tags: Mapping[str, str]

    @property
    def is_generator(self) -> bool:
        """Whether this is a generator of latents, which names their tokenizer."""
        return "tokenizer_digest" in self.tags

    def number(self, name: str) -> Decimal | None:
        """Return a metric; None if it is missing or not a finite number."""
        try:
            value = Decimal(self.tags.get(f"metric.{name}", ""))
        except InvalidOperation:
            return None
        return value if value.is_finite() else None


@dataclass(frozen=True)
class Verdict:
    """Verdict of one gate.

    Attributes:
        gate: Name of the gate.
        outcome: Outcome; "skipped" if the user skipped the gate.
        candidate: Relevant tags of the version to promote.
        present: Relevant tags of the version that has the alias; "" if there is none.
        remark: Requirement; for a gate that fails, the remedy too.
    """

    gate: str
    outcome: Literal["ok", "FAIL", "skipped"]
    candidate: str
    present: str
    remark: str


@dataclass(frozen=True)
class Promotion:
    """Result of `promote`.

    Attributes:
        version: Version to promote.
        alias: Alias to move.
        verdicts: Verdicts of the gates, integrity first.
        before: Version that had the alias, if any.
        now: Version that the alias points to at the end, if any.
    """

    version: "RegisteredVersion"
    alias: str
    verdicts: list[Verdict]
    before: "RegisteredVersion | None"
    now: "RegisteredVersion | None"

    @property
    def refused(self) -> bool:
        """Whether a gate failed, so that nothing was changed."""
        return any(verdict.outcome == "FAIL" for verdict in self.verdicts)

    @property
    def succeeded(self) -> bool:
        """Whether the alias points to the version and no gate failed."""
        return not self.refused and self.now == self.version


def promote(model: str, alias: str, terms: Terms, server: Server, *, compare: bool) -> Promotion:
    """Point an alias to a version, if it passes the gates.

    The version's tag "promoted.ALIAS" then records what it replaced, and which gates it passed or
    skipped.

    Args:
        model: URI, "models:/NAME/VERSION" or "models:/NAME@ALIAS".
        alias: Alias to move; it need not exist.
        terms: Requirements of the gates.
        server: MLflow server of the registry.
        compare: Whether to apply the gates; if False, only integrity is checked.

    Raises:
        ValueError: There is no such version or metric, MLflow rejects the alias or does not
            answer, or another promotion is under way.
        ConnectionError: MLflow fails.
    """
    from efae.registry import (
        versions,
    )  # MLflow takes seconds to import, and judging does not need it

    versions.check_alias(alias)
    version = versions.read_version(model, server)
    integrity = _check_integrity(version, server)
    with versions.promote_alone(version.name, server):
        before = versions.read_alias(version.name, alias, server)
        verdicts = [integrity]
        if compare and before != version:
            present = before and Contender(before.uri, before.tags)
            verdicts += judge(Contender(version.uri, version.tags), present, terms)
        if before == version or any(verdict.outcome == "FAIL" for verdict in verdicts):
            return Promotion(version, alias, verdicts, before, before)
        passed, skipped = (
            ", ".join(v.gate for v in verdicts if v.outcome == outcome) or "none"
            for outcome in ("ok", "skipped")
        )
        replaced = before.uri if before else "nothing"
        note = f"replaced: {replaced}; passed: {passed}; skipped: {skipped}"
        versions.move_alias(version, alias, note, server)
        now = versions.read_alias(version.name, alias, server)
    return Promotion(version, alias, verdicts, before, now)


def _check_integrity(version: "RegisteredVersion", server: Server) -> Verdict:
    from efae.checkpoints.checkpoint import CheckpointError
    from efae.registry import pull

    try:
        pull.verify(version, server)
    except CheckpointError as error:
        remedy = f"{error.reason}: restore the files of its run {version.tags.get('run_name', '')}"
        return Verdict("integrity", "FAIL", "damaged", "", remedy.rstrip())
    digest = version.tags.get("digest", "")[:12]
    return Verdict("integrity", "ok", digest, "", "the stored files are those registered, and load")


def record_fid(
    model: str, digest: str, fid: float, terms: tuple[str, str, str], server: Server
) -> "RegisteredVersion":
    """Write the FID of samples to the tags of the version that drew them, over an earlier one.

    Args:
        model: URI of the generator, as `jobs/generate.py sample` took it.
        digest: Digest of its weights, which an alias may no longer name.
        fid: FID of the samples.
        terms: Identities of the reference and of the network that made the features, and the
            options that the samples were drawn with: only FIDs of equal terms compare.
        server: MLflow server of the registry.

    Returns:
        The version.

    Raises:
        ValueError: There is no such version, it has other weights, or MLflow does not answer.
        ConnectionError: MLflow fails.
    """
    from efae.registry import versions

    name, alias, _ = model.partition("@")
    version = versions.read_version(f"{name}@sha256:{digest}" if alias else model, server)
    if version.tags.get("digest") != digest:
        raise ValueError(f"{version.uri} has other weights than the generator of the samples")
    # Unknown until all tags are there: unknown never passes a gate.
    tags = {"metric.fid": "unknown", **dict(zip(_SAMPLED, terms, strict=True))}
    for key, value in (*tags.items(), ("metric.fid", f"{fid:.6g}")):
        versions.set_tag(version, key, value, server)
    return version


def judge(candidate: Contender, present: Contender | None, terms: Terms) -> list[Verdict]:
    """Return the verdict of every gate; without `present`, comparisons pass if all is known.

    Raises:
        ValueError: There is no such metric; the message lists usable ones.
    """
    known = ["fid"] if candidate.is_generator else list(HIGHER_IS_BETTER)
    metric = terms.metric or known[0]
    if metric not in known:
        what = "a generator is compared by fid" if candidate.is_generator else "unknown"
        raise ValueError(f"--metric {metric}: {what}; {_name_metrics(candidate, present)}")
    verdicts: list[Verdict] = []
    for gate, (keys, asked, fault) in _apply_gates(candidate, present, metric, terms).items():
        outcome = "skipped" if gate in terms.skip else "FAIL" if fault else "ok"
        if fault:
            asked += f": {fault}"
        elif present is None and gate != "lineage":
            asked += ": nothing to compare with"
        shown = _show(candidate, keys), _show(present, keys)
        verdicts.append(Verdict(gate, outcome, *shown, asked))
    return verdicts


def _apply_gates(
    candidate: Contender, present: Contender | None, metric: str, terms: Terms
) -> dict[GateName, tuple[tuple[str, ...], str, str | None]]:
    """Return the tags that each gate reads, what it asks, and the fault that it finds, if any.

    Generators have two gates: samples are compared with training images by custom, and their
    equivariance is not measured.
    """
    way = "higher" if HIGHER_IS_BETTER[metric] else "lower"
    measured = (
        ("group", f"metric.{metric}") if metric in _OVER_GROUP else (f"metric.{metric}",),
        f"{metric} {way} by more than {terms.margin:g}",
        _find_fault_of_metric(candidate, present, metric, terms.margin),
    )
    if candidate.is_generator:
        asked = "samples drawn and compared with the same options"
        fault = _find_fault_of_images(candidate, present, _SAMPLED)
        return {"images": (_SAMPLED, asked, fault), "metric": measured}
    return {
        "lineage": (
            ("train_data", "held_out_data"),
            "not measured on the images trained on",
            _find_fault_of_lineage(candidate, present),
        ),
        "images": (
            _MEASURED,
            "both measured on the same images",
            _find_fault_of_images(candidate, present, _MEASURED),
        ),
        "metric": measured,
        "gap": (
            ("group", "metric.worst_gap_db"),
            f"worst_gap_db larger by {terms.gap_tolerance_db:g} at most",
            _find_fault_of_gap(candidate, present, terms),
        ),
    }


def _find_fault_of_lineage(candidate: Contender, present: Contender | None) -> str | None:
    train, held_out = (candidate.tags.get(key) for key in ("train_data", "held_out_data"))
    if not (train and held_out):
        return f"unknown; {_measure_again(candidate, present)}"
    return f"it was; {_measure_again(candidate, present, 'URI')}" if train == held_out else None


def _find_fault_of_images(
    candidate: Contender, present: Contender | None, keys: tuple[str, ...]
) -> str | None:
    sets = [
        [contender.tags.get(key) for key in keys]
        for contender in (candidate, present)
        if contender is not None
    ]
    if not all(map(all, sets)):
        return f"unknown; {_measure_again(candidate, present)}"
    if sets[0] != sets[-1]:
        what = "they were not" if candidate.is_generator else "other images"
        return f"{what}, so the numbers cannot be compared; {_measure_again(candidate, present)}"
    return None


def _find_fault_of_metric(
    candidate: Contender, present: Contender | None, metric: str, margin: float
) -> str | None:
    mine = candidate.number(metric)
    other = mine if present is None else present.number(metric)
    if mine is None or other is None:
        if candidate.is_generator:
            return f"unknown; {_measure_again(candidate, present)}"
        return f"unknown; {_name_metrics(candidate, present)}: choose with --metric"
    if metric in _OVER_GROUP and (fault := _find_fault_of_group(candidate, present)):
        return fault
    gain = mine - other if HIGHER_IS_BETTER[metric] else other - mine
    if present is None or gain > Decimal(str(margin)):
        return None
    return "not so; train a better one, or keep what there is"


def _find_fault_of_gap(candidate: Contender, present: Contender | None, terms: Terms) -> str | None:
    mine = candidate.number("worst_gap_db")
    other = mine if present is None else present.number("worst_gap_db")
    if mine is None or other is None:
        return f"unknown; {_measure_again(candidate, present)}"
    if fault := _find_fault_of_group(candidate, present):
        return fault
    if mine - other <= Decimal(str(terms.gap_tolerance_db)):
        return None
    exact = "--model.level exact"
    if candidate.tags.get("kind") == "diffusers":
        exact = f"--start.symmetrize {exact} --start.action spatial"
    return f"not so; train with {exact}, or say with --gap-tolerance what you accept"


def _find_fault_of_group(candidate: Contender, present: Contender | None) -> str | None:
    mine = GROUPS.get(candidate.tags.get("group", ""))
    other = mine if present is None else GROUPS.get(present.tags.get("group", ""))
    if mine is None or other is None:
        return f"unknown group; {_measure_again(candidate, present)}"
    if present is None or set(other) <= set(mine):
        return None
    return (
        f"measured over {mine}, {present.uri} over {other}; train with --representation.group"
        f" {other}, or {_measure_again(candidate, present)}"
    )


def _show(contender: Contender | None, keys: tuple[str, ...]) -> str:
    """Return tags as text; "" without a contender."""
    return " / ".join(contender.tags.get(key) or "unknown" for key in keys) if contender else ""


def _name_metrics(candidate: Contender, present: Contender | None) -> str:
    """Return text that lists the metrics that can be compared."""
    both = [
        name
        for name in HIGHER_IS_BETTER
        if candidate.number(name) is not None
        and (present is None or present.number(name) is not None)
    ]
    who = f"{candidate.uri} and {present.uri} both carry" if present else f"{candidate.uri} carries"
    return f"{who} {', '.join(both) or 'none that is known'}"


def _measure_again(candidate: Contender, present: Contender | None, data: str = "") -> str:
    """Return the remedy for missing tags: measure, then skip the gate deliberately."""
    if candidate.is_generator:
        models = f"{present.uri} and {candidate.uri}" if present else candidate.uri
        return (
            f"draw samples with python jobs/generate.py sample --model, of {models}, and compare"
            " them with python jobs/generate.py compare, all with the same options: it records FID"
        )
    models = f"{present.uri} {candidate.uri}" if present else candidate.uri
    data = data or candidate.tags.get("held_out_uri") or "URI"
    return (
        f"measure with python jobs/evaluate.py --model {models} --data {data} and name in --skip"
        " the gates that you answer for then"
    )
