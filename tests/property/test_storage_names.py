"""An operation on one name leaves every object of another name as it is, byte for byte."""

import itertools
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from data_pipelines import storage
from data_pipelines.storage import Location

# What some client, shell or server between here and the store takes for syntax.
HOSTILE = "[]*?!#%+&=;:@$'\"`\\ {}~^|<>,()-_.\u00e9e\u0301\U0001f986\n\t\r\x01\x7f\u2028"
KNOWN = [
    *("lr1", "lr[1]", "lr[1", "lr*", "lr?", "lr[!2]", "lr**", "lr", "lr11", "LR1"),
    *("a?versionId=3", "a?versionId=", "a#12", "a%23", "a%2512", "a%20b", "a b", "a+b", "a%2Bb"),
    *(
        "x.",
        "x..",
        "...",
        " x",
        "x ",
        "~",
        "$HOME",
        "\u00e9",
        "e\u0301",
        "a\\b",
        "a\nb",
        "{1,2}",
        "-rf",
    ),
]
SEGMENT = (
    st.sampled_from(KNOWN)
    | st.text("ab1" + HOSTILE, min_size=1, max_size=6)
    | st.builds(str.__add__, st.sampled_from(KNOWN), st.sampled_from(["", "1", "*", "?", "]"]))
).filter(lambda segment: segment not in (".", ".."))
NAME = st.lists(SEGMENT, min_size=1, max_size=3).map("/".join)


@st.composite
def folders(draw):
    """({name: bytes}, one of the names or of the folders in them); no name is a folder too."""
    names = draw(st.lists(NAME, min_size=2, max_size=7, unique=True))
    assume(not any(b.startswith(f"{a}/") for a, b in itertools.permutations(names, 2)))
    victim = draw(st.sampled_from(names)).split("/")
    victim = "/".join(victim[: draw(st.integers(1, len(victim)))])
    return {name: f"content of {name!r}".encode() for name in names}, victim


EXAMPLES = [
    ({"lr[1]/a": b"1", "lr1/a": b"2", "lr[1]x/a": b"3"}, "lr[1]"),
    ({"q?/a": b"1", "q7/a": b"2", "q/a": b"3"}, "q?"),
    ({"run*": b"1", "run1": b"2", "run": b"3", "run**": b"4"}, "run*"),
    ({"a?versionId=3.jpg": b"1", "a": b"2", "a?versionId=4.jpg": b"3"}, "a?versionId=3.jpg"),
    ({"p/x": b"1", "p1/x": b"2", "p/xx": b"3", "pp/x": b"4"}, "p/x"),
    ({"a\nb": b"1", "a b": b"2", "ab": b"3", "a\x01b": b"4"}, "a\nb"),
    ({"\u00e9": b"1", "e\u0301": b"2"}, "e\u0301"),
    ({"a%2Fb": b"1", "a/b": b"2", "a%252Fb": b"3"}, "a%2Fb"),
]


def check_that_names_are_literal(uri: str, objects: dict[str, bytes], victim: str) -> None:
    """Writes the objects below `uri`, deletes the victim, and looks at all after each step."""
    base = Location.parse(uri)

    def check() -> None:
        assert storage.list_files(base) == {name: len(kept[name]) for name in sorted(kept)}
        for name, data in kept.items():
            location = base / name
            assert storage.read_bytes(location) == data
            assert storage.read_range(f"{uri}/{name}", 1, len(data)) == data[1:]
            assert storage.exists(location)

    kept: dict[str, bytes] = {}
    for name, data in objects.items():
        assert not storage.exists(base / name)
        storage.write_bytes(base / name, data)
        kept[name] = data
    check()
    with tempfile.TemporaryDirectory() as folder:
        storage.download_folder(base, folder)
        copies = {name: (Path(folder) / name).read_bytes() for name in objects}
        assert copies == objects
        storage.upload_folder(folder, f"{base} [copy]*")
    assert set(storage.list_files(f"{base} [copy]*")) == set(objects)
    storage.delete(f"{base} [copy]*")
    check()
    name = next(iter(objects))
    storage.write_bytes(base / name, b"other content")
    kept[name] = b"other content"
    check()
    storage.delete(base / victim)
    kept = {n: d for n, d in kept.items() if n != victim and not n.startswith(f"{victim}/")}
    assert not storage.exists(base / victim)
    check()
    storage.delete(base)
    assert storage.list_files(base) == {}


def with_examples(test):
    for given_folder in EXAMPLES:
        test = example(given_folder)(test)
    return test


@with_examples
@given(folders())
@settings(max_examples=150, deadline=None)
def test_names_of_files_are_literal(folder):
    base = Path(tempfile.mkdtemp(prefix="efae-names-"))
    try:
        check_that_names_are_literal(str(base / "set[1]"), *folder)
        assert list(base.iterdir()) == []
    finally:
        shutil.rmtree(base)


def check_that_names_of_objects_are_literal(folder):
    assume(not any("\\" in name for name in folder[0]))  # SeaweedFS makes them slashes
    base = "s3://efae-data/names[1]"
    storage.delete(base)
    neighbours = {f"s3://efae-data/names{end}/x": end.encode() for end in ("1", "", "[1", "[1]x")}
    for uri, data in neighbours.items():
        storage.write_bytes(uri, data)
    check_that_names_are_literal(base, *folder)
    assert {uri: storage.read_bytes(uri) for uri in neighbours} == neighbours


ON_S3 = settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.s3
@with_examples
@given(folders())
@ON_S3
def test_names_of_objects_are_literal(local_stack, folder):
    check_that_names_of_objects_are_literal(folder)


@pytest.mark.s3
@pytest.mark.slow
@given(folders())
@settings(ON_S3, max_examples=100)
def test_many_names_of_objects_are_literal(local_stack, folder):
    check_that_names_of_objects_are_literal(folder)
