"""Every gate of promotion: what passes, what does not, and that unknown never does."""

from decimal import Decimal

import pytest

from efae.registry import versions
from efae.registry.promotion import GATES, HIGHER_IS_BETTER, Contender, Terms, judge, promote
from efae.tracking.server import Server

TAGS = {
    "train_data": "aaaa",
    "held_out_data": "bbbb",
    "held_out_images": "512",
    "held_out_uri": "s3://data/held_out",
    "image_shape": "3x32x32",
    "group": "D4",
    "metric.psnr": "24.0",
    "metric.worst_gap_db": "2e-06",
}


def contender(version: int, **changes: str | None) -> Contender:
    """With other tags; None takes one away. "metric_psnr" stands for "metric.psnr"."""
    named = {key.replace("metric_", "metric."): value for key, value in changes.items()}
    tags = {key: value for key, value in (TAGS | named).items() if value is not None}
    return Contender(f"models:/efae/{version}", tags)


CHAMPION = contender(1)
BETTER = contender(2, metric_psnr="24.5")


def outcomes(candidate: Contender, present: Contender | None, **terms) -> dict[str, str]:
    return {v.gate: v.outcome for v in judge(candidate, present, Terms(**terms))}


def remark(gate: str, candidate: Contender, present: Contender | None, **terms) -> str:
    return next(v.remark for v in judge(candidate, present, Terms(**terms)) if v.gate == gate)


def failing(candidate: Contender, present: Contender | None, **terms) -> list[str]:
    return [gate for gate, out in outcomes(candidate, present, **terms).items() if out == "FAIL"]


def test_a_better_version_passes_every_gate():
    assert outcomes(BETTER, CHAMPION) == dict.fromkeys(GATES, "ok")


def test_a_version_is_not_better_than_itself():
    assert failing(CHAMPION, CHAMPION) == ["metric"]


@pytest.mark.parametrize("metric", [name for name in HIGHER_IS_BETTER if name != "worst_gap_db"])
def test_of_two_versions_one_at_most_is_better(metric):
    high, low = (
        contender(version, **{f"metric_{metric}": value})
        for version, value in ((1, "0.75"), (2, "0.5"))
    )
    better, worse = (high, low) if metric in ("psnr", "ssim") else (low, high)
    assert failing(better, worse, metric=metric) == []
    assert failing(worse, better, metric=metric) == ["metric"]


def test_a_smaller_gap_can_be_what_is_asked():
    small, large = contender(1, metric_worst_gap_db="0.01"), contender(2, metric_worst_gap_db="0.3")
    assert failing(small, large, metric="worst_gap_db") == []
    assert failing(large, small, metric="worst_gap_db") == ["metric", "gap"]


def test_better_by_exactly_the_margin_is_not_enough():
    assert 24.1 - 24.0 > 0.1  # in binary, so decimals are compared
    by = contender(2, metric_psnr="24.1")
    assert failing(by, CHAMPION, margin=0.1) == ["metric"]
    assert failing(by, CHAMPION, margin=0.0999) == []
    assert "psnr higher by more than 0.1" in remark("metric", by, CHAMPION, margin=0.1)


@pytest.mark.parametrize(
    ("gap", "fails"), [("0.00099", False), ("0.001002", False), ("0.001003", True), ("16", True)]
)
def test_a_gap_may_be_larger_by_rounding_only(gap, fails):
    candidate = contender(2, metric_psnr="30", metric_worst_gap_db=gap)
    assert failing(candidate, CHAMPION) == (["gap"] if fails else [])
    assert failing(candidate, CHAMPION, gap_tolerance_db=20.0) == []
    if fails:
        assert "train with --model.level exact" in remark("gap", candidate, CHAMPION)
        tuned = contender(3, metric_psnr="30", metric_worst_gap_db=gap, kind="diffusers")
        said = remark("gap", tuned, CHAMPION)
        assert "train with --start.symmetrize --model.level exact --start.action spatial" in said
    assert failing(candidate, CHAMPION, gap_tolerance_db=0.0) == ["gap"]


@pytest.mark.parametrize(
    ("mine", "other", "said"),
    [
        ("mirror", "D4", "measured over mirror, models:/efae/1 over D4; train with"),
        ("trivial", "mirror", "measured over trivial, models:/efae/1 over mirror; train with"),
        ("C4", "flips", "measured over C4, models:/efae/1 over flips; train with"),
        ("D4", "flips", None),
        ("mirror", "mirror", None),
        (None, "D4", "unknown group"),
        ("D4", None, "unknown group"),
        (None, None, "unknown group"),
        ("D8", "D8", "unknown group"),
    ],
)
def test_the_worst_over_fewer_elements_does_not_compare(mine, other, said):
    changes = {"metric_worst_gap_db": "1e-7", "metric_encoder_error": "1e-7"}
    candidate = contender(2, metric_psnr="24.5", group=mine, **changes)
    present = contender(1, group=other, metric_encoder_error="1e-6")
    assert failing(candidate, present) == (["gap"] if said else [])
    for metric in ("worst_gap_db", "encoder_error"):
        assert failing(candidate, present, metric=metric) == (["metric", "gap"] if said else [])
    if said:
        assert said in remark("gap", candidate, present)
    shown = judge(candidate, present, Terms())[GATES.index("gap")]
    assert (shown.candidate, shown.present) == (
        f"{mine or 'unknown'} / 1e-7",
        f"{other or 'unknown'} / 2e-06",
    )


@pytest.mark.parametrize("value", [None, "", "nan", "NaN", "inf", "-Infinity", "sNaN", "good"])
@pytest.mark.parametrize("who", ["candidate", "champion"])
def test_what_is_no_number_never_passes(value, who):
    def change(contender_: Contender, key: str) -> Contender:
        tags = {k: v for k, v in contender_.tags.items() if k != key}
        return Contender(contender_.uri, tags if value is None else tags | {key: value})

    for key, gate in (("metric.psnr", "metric"), ("metric.worst_gap_db", "gap")):
        pair = [BETTER, CHAMPION]
        pair[who == "champion"] = change(pair[who == "champion"], key)
        assert failing(*pair) == [gate]
        if who == "candidate":
            assert failing(pair[0], None) == [gate]
    assert "both carry worst_gap_db: choose with --metric" in remark(
        "metric", change(BETTER, "metric.psnr"), CHAMPION
    )


@pytest.mark.parametrize("key", ["held_out_data", "held_out_images", "image_shape"])
def test_numbers_of_other_images_do_not_compare(key):
    for present in (contender(1, **{key: "other"}), contender(1, **{key: None})):
        assert failing(BETTER, present) == ["images"]
        assert (
            "jobs/evaluate.py --model models:/efae/1 models:/efae/2 --data s3://data/held_out"
        ) in remark("images", BETTER, present)
    lacking = contender(2, metric_psnr="24.5", **{key: None})
    assert "images" in failing(lacking, CHAMPION)
    assert "images" in failing(lacking, contender(1, **{key: None}))  # unknown is not the same
    assert "images" in failing(lacking, None)


def test_a_version_of_before_there_was_lineage_is_unknown():
    old = Contender("models:/efae/1", {"metric.psnr": "20", "metric.worst_gap_db": "1e-6"})
    assert failing(old, None) == ["lineage", "images", "gap"]
    # The champion's own lineage is not judged again.
    assert failing(BETTER, old) == ["images", "gap"]
    assert "unknown" in remark("images", BETTER, old)


def test_a_version_measured_on_what_it_was_trained_on_is_refused():
    assert failing(contender(2, metric_psnr="40", train_data="bbbb"), CHAMPION) == ["lineage"]
    assert failing(contender(2, train_data="bbbb"), None) == ["lineage"]


def test_the_first_champion_needs_no_other_and_that_is_said():
    assert failing(CHAMPION, None) == []
    assert [v.gate for v in judge(CHAMPION, None, Terms()) if "nothing to compare" in v.remark] == [
        "images",
        "metric",
        "gap",
    ]
    assert {v.present for v in judge(CHAMPION, None, Terms())} == {""}


@pytest.mark.parametrize("gate", GATES)
def test_a_gate_is_skipped_alone_and_shows_what_it_would_say(gate):
    hopeless = Contender("models:/efae/2", {})
    expected = dict.fromkeys(GATES, "FAIL") | {gate: "skipped"}
    assert outcomes(hopeless, CHAMPION, skip=(gate,)) == expected
    assert "unknown" in remark(gate, hopeless, CHAMPION, skip=(gate,))


def test_both_values_stand_in_a_verdict_as_the_tags_spell_them():
    verdict = judge(BETTER, CHAMPION, Terms())[GATES.index("metric")]
    assert (verdict.candidate, verdict.present) == ("24.5", "24.0")


def test_an_unknown_metric_names_those_that_both_carry():
    mine = contender(2, metric_ssim="0.9", metric_fid="3", metric_taste="7")
    present = contender(1, metric_fid="4", metric_taste="6")
    with pytest.raises(ValueError, match=r"--metric taste.*both carry psnr, worst_gap_db, fid$"):
        judge(mine, present, Terms(metric="taste"))
    with pytest.raises(ValueError, match=r"models:/efae/2 carries psnr, ssim, worst_gap_db, fid$"):
        judge(mine, None, Terms(metric="taste"))
    with pytest.raises(ValueError, match="none that is known"):
        judge(Contender("models:/efae/2", {}), present, Terms(metric="taste"))


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"margin": -0.1}, "--margin -0.1"),
        ({"margin": float("nan")}, "--margin nan"),
        ({"gap_tolerance_db": float("inf")}, "--gap-tolerance inf"),
        ({"skip": ("integrity",)}, "--skip integrity: the gates are lineage, images"),
    ],
)
def test_terms_that_mean_nothing_are_refused(terms, message):
    with pytest.raises(ValueError, match=message):
        Terms(**terms)


def test_a_number_is_read_to_its_last_digit():
    assert contender(1, metric_psnr="0.1000001").number("psnr") == Decimal("0.1000001")


SAMPLED = {
    "tokenizer_digest": "tttt",
    "fid_reference": "rrrr",
    "fid_features": "Inception ffff",
    "fid_samples": "50000 of 3 x 256 x 256, 50 steps, guidance 1 in 0-1, classes 0-999",
    "metric.fid": "8.5",
    "metric.psnr": "24.0",
}


def generator(version: int, **changes: str | None) -> Contender:
    named = {key.replace("metric_", "metric."): value for key, value in changes.items()}
    tags = {key: value for key, value in (SAMPLED | named).items() if value is not None}
    return Contender(f"models:/efae-generator/{version}", tags)


def test_generators_are_compared_by_fid_and_by_no_gate_of_autoencoders():
    better, champion = generator(2, metric_fid="8.25"), generator(1)
    assert outcomes(better, champion) == {"images": "ok", "metric": "ok"}
    assert failing(champion, better) == failing(champion, champion) == ["metric"]
    assert failing(better, champion, metric="fid", margin=0.25) == ["metric"]
    assert failing(better, None) == []
    with pytest.raises(ValueError, match="--metric psnr: a generator is compared by fid"):
        judge(better, champion, Terms(metric="psnr"))


@pytest.mark.parametrize("key", ["fid_reference", "fid_features", "fid_samples"])
def test_fids_of_samples_that_were_drawn_or_compared_otherwise_do_not_compare(key):
    better = generator(2, metric_fid="1")
    for present in (generator(1, **{key: "other"}), generator(1, **{key: None})):
        assert failing(better, present) == ["images"]
        assert "of models:/efae-generator/1 and models:/efae-generator/2, and compare" in remark(
            "images", better, present
        )
    assert failing(generator(2, **{key: None}), None) == ["images"]
    for value in (None, "unknown"):
        assert failing(generator(2, metric_fid=value), generator(1)) == ["metric"]


@pytest.mark.parametrize("alias", ["latest", "Latest", "v3", "", "a/b", "best one"])
def test_an_alias_that_mlflow_refuses_is_refused_before_anything_is_asked(alias):
    nobody = Server("http://127.0.0.1:9")
    with pytest.raises(ValueError, match=f"--alias {alias}: use letters.*which MLflow reserves"):
        promote("models:/efae/2", alias, Terms(), nobody, compare=False)


@pytest.mark.parametrize("before", [{}, {"promoted.latest": "replaced: nothing"}])
def test_an_alias_that_is_not_set_leaves_the_tags_as_they_were(tmp_path, monkeypatch, before):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow's own, without a server
    server = Server(str(tmp_path))
    client = server.client()
    client.create_registered_model("efae")
    client.create_model_version("efae", str(tmp_path / "model"), tags=before)
    version = versions.as_registered(client.get_model_version("efae", "1"))
    with pytest.raises(ValueError, match="reserved"):
        versions.move_alias(version, "latest", "replaced: efae/2", server)
    assert client.get_model_version("efae", "1").tags == before
    versions.move_alias(version, "best", "replaced: efae/2", server)
    after = client.get_model_version_by_alias("efae", "best")
    assert after.tags == {**before, "promoted.best": "replaced: efae/2"}
