"""A location is checked when it is made; its URI is the one that indexes and manifests hold."""

import pickle
from pathlib import Path

import pytest

from data_pipelines.storage import Location
from data_pipelines.storage.location import drop_query


@pytest.mark.parametrize(
    ("folder", "name", "uri"),
    [
        ("set", "a.tar", "set/a.tar"),
        ("./set//", "a/b", "./set/a/b"),
        (".", "a", "./a"),
        ("/", "a//b", "/a//b"),
        ("/data", "/etc/passwd", "/data//etc/passwd"),
        ("file:///data/", "a", "file:///data/a"),
        ("s3://bucket", "a#1?versionId=2", "s3://bucket/a#1?versionId=2"),
        ("s3://bucket/set/", "100%", "s3://bucket/set/100%"),
        ("gs://bucket/set", " [1]* ", "gs://bucket/set/ [1]* "),
        ("http://host/a%20set", "x 0#/é", "http://host/a%20set/x%200%23/%C3%A9"),
    ],
)
def test_a_name_is_appended_as_it_is(folder, name, uri):
    location = Location.parse(folder)
    assert str(location) == folder
    assert str(location / name) == location.uri_of(name) == uri
    assert location / name == Location.parse(uri)


@pytest.mark.parametrize(
    ("place", "scheme", "path", "is_http"),
    [
        ("a/x:y", "", Path("a/x:y"), False),
        (Path("/a"), "", Path("/a"), False),
        ("file:///a/b", "file", Path("/a/b"), False),
        ("s3://bucket/a", "s3", None, False),
        ("https://host/a", "https", None, True),
    ],
)
def test_what_a_location_knows(place, scheme, path, is_http):
    location = Location.parse(place)
    assert (location.scheme, location.path, location.is_http) == (scheme, path, is_http)
    assert (Location.parse(place) == location, {location: 1}[Location.parse(place)]) == (True, 1)
    again = pickle.loads(pickle.dumps(location))
    assert (again, again.scheme, again.path, again.is_http) == (location, scheme, path, is_http)


def test_a_location_is_not_parsed_again():
    location = Location.parse("s3://bucket/a")
    assert Location.parse(location) is location


@pytest.mark.parametrize(
    ("folder", "name", "fault"),
    [
        ("set", "a\0b", "zero byte"),
        ("s3://bucket/set", "../other", r"take \. and \.\. out of it"),
        ("https://host/set", "..", r"take \. and \.\. out of it"),
        ("gs://bucket", "n" * 1025, "the name has 1025 bytes"),
        ("s3://bucket", "caf\udce9", "not UTF-8"),
    ],
)
def test_a_name_that_storage_cannot_hold_is_refused_but_can_be_told(folder, name, fault):
    with pytest.raises(ValueError, match=fault):
        Location.parse(folder) / name
    assert Location.parse(folder).uri_of(name) == f"{folder}/{name}"


def test_a_signature_is_not_shown():
    assert Location.parse("https://host/a?signature=x").display == "https://host/a"
    assert Location.parse("s3://bucket/a?b").display == "s3://bucket/a?b"
    assert drop_query("wds:https://host/a?signature=x") == "wds:https://host/a"
