"""Sets of photographs: what is a photograph, what is held out, and what is cropped."""

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.photographs.__main__ import main
from benchmarks.photographs.crops import LARGEST_SCALE, SMALLEST_SCALE, Crops
from benchmarks.photographs.packages import fetch_packages, find_packages, unpack
from benchmarks.photographs.pictures import SMALLEST, Photograph, find_photographs, split
from data_pipelines.building.sample_encoding import Encoding
from data_pipelines.shards.index import load_index

WALLPAPERS = "usr/share/backgrounds"
SIZE = (SMALLEST + 20, SMALLEST)


def paint(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """Paint clouds with noise, whatever the size the same ones."""
    random = np.random.default_rng(seed)
    clouds = Image.fromarray(random.integers(0, 255, (6, 6, 3), dtype=np.uint8))
    pixels = np.asarray(clouds.resize(size, Image.Resampling.BICUBIC), np.int16)
    return Image.fromarray(
        (pixels + random.integers(-9, 9, pixels.shape)).clip(0, 255).astype("u1")
    )


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def pack(folder: Path, name: str, version: str, archive: Path) -> None:
    control = folder / "DEBIAN" / "control"
    control.parent.mkdir(parents=True)
    fields = {"Package": name, "Version": version, "Architecture": "all"}
    fields |= {"Maintainer": "Nobody <nobody@example.org>", "Description": "wallpapers"}
    control.write_text("".join(f"{key}: {value}\n" for key, value in fields.items()))
    run = ["dpkg-deb", "--root-owner-group", "-Znone", "-b", str(folder), str(archive)]
    subprocess.run(run, check=True, capture_output=True)


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two packages of 14 photographs and eight other pictures."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("needs dpkg-deb")
    root = tmp_path_factory.mktemp("packages")
    scenes, mate = root / "scenes", root / "mate"
    for number in range(11):
        save(paint(number), scenes / WALLPAPERS / f"Scene_{number:02d}.png")
    (scenes / WALLPAPERS / "Link.png").symlink_to("Scene_00.png")
    save(paint(0, (600, 576)), scenes / WALLPAPERS / "Renamed.webp")
    save(Image.new("RGB", SIZE, "teal"), scenes / WALLPAPERS / "Teal.png")
    save(paint(50, (400, 300)), scenes / WALLPAPERS / "Small.jpg")
    (scenes / WALLPAPERS / "Broken.jpg").write_bytes(b"no picture")
    save(paint(53), scenes / WALLPAPERS / "Cut.png")
    whole = (scenes / WALLPAPERS / "Cut.png").read_bytes()
    (scenes / WALLPAPERS / "Cut.png").write_bytes(whole[: len(whole) // 2])
    theme = scenes / "usr/share/wallpapers/Theme/contents/images"
    save(paint(51, (700, 500)), theme / "700x500.png")
    save(paint(52, (480, 900)), theme / "480x900.png")
    for number in range(2):
        save(paint(60 + number), mate / WALLPAPERS / f"mate/nature/{number}.jpg")
    save(paint(70), mate / WALLPAPERS / "mate/abstract/Waves.png")
    folder = root / "archives"
    folder.mkdir()
    pack(scenes, "scenes", "2:1.0-3", folder / "scenes.deb")
    pack(mate, "mate-backgrounds", "1.26", folder / "mate.deb")
    return folder


@pytest.fixture
def build(archives: Path, tmp_path: Path) -> Callable[..., Path]:
    def run(name: str, *options: str) -> Path:
        sizes = ["--side", "16", "24", "--crops", "61", "--held-out-crops", "41"]
        main(["--output", str(tmp_path / name), "--packages", str(archives), *sizes, *options])
        return tmp_path / name

    return run


def read_keys(folder: Path) -> list[str]:
    return [key for shard in load_index(folder).shards for key in shard.keys]


def test_every_picture_is_a_photograph_or_counted_once(archives: Path, tmp_path: Path):
    packages = unpack(find_packages(archives), tmp_path)
    assert [(each.name, each.version) for each in packages] == [
        ("mate-backgrounds", "1.26"),
        ("scenes", "2:1.0-3"),
    ]
    photographs, dropped = find_photographs(packages)
    assert dropped.counts == {
        "drawing by name": 1,
        "link to a picture": 1,
        "duplicate under another name": 1,
        "flat drawing": 1,
        f"picture smaller than {SMALLEST} px": 1,
        "unreadable picture": 2,
        "another size of a picture": 1,
    }
    found = [each.name for each in photographs]
    # The larger of two duplicates stays.
    scenes = ["scenes/Renamed", *(f"scenes/Scene_{number:02d}" for number in range(1, 11))]
    nature = ["mate-backgrounds/mate/nature/0", "mate-backgrounds/mate/nature/1"]
    assert found == [*nature, *scenes, "scenes/Theme"]
    assert photographs[-1].size == (500, 700)
    files = [path for path in tmp_path.rglob(f"{WALLPAPERS[:9]}/**/*.*") if path.is_file()]
    assert len(photographs) + sum(dropped.counts.values()) == len(files)


def test_no_photograph_has_crops_in_both_sets_and_counts_add_up(build: Callable[..., Path]):
    folder = build("sets")
    summary = json.loads((folder / "photographs.json").read_text())
    assert {name: each["photographs"] for name, each in summary["packages"].items()} == {
        "mate-backgrounds": 2,
        "scenes": 12,
    }
    chosen = summary["photographs"]
    assert len(chosen["held_out"]) == 10
    assert len(chosen["train"]) == 4
    assert not set(chosen["held_out"]) & set(chosen["train"])
    for name, count in {"train": 61, "held_out": 41}.items():
        for side in (16, 24):
            keys = read_keys(folder / str(side) / name)
            assert (
                len(set(keys)) == len(keys) == count == summary["sets"][f"{side}/{name}"]["crops"]
            )
            photographs = [key.rpartition("-")[0] for key in keys]
            shares = [photographs.count(each) for each in chosen[name]]
            assert sum(shares) == count
            assert max(shares) - min(shares) <= 1
            index = load_index(folder / str(side) / name)
            assert index.image_shape == (3, side, side)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_the_same_split(
    build: Callable[..., Path],
):
    first, again, other = build("first"), build("again"), build("other", "--seed", "1")

    def read(folder: Path) -> dict[str, bytes]:
        files = (path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    assert read(first) == read(again)
    tars = {name for name in read(first) if name.endswith(".tar")}
    assert len(tars) == 4
    assert not any(read(first)[name] == read(other)[name] for name in tars)
    splits = [json.loads((each / "photographs.json").read_text()) for each in (first, other)]
    assert splits[0]["photographs"] == splits[1]["photographs"]


def test_a_photograph_that_joins_moves_at_most_one_other():
    def names(photographs: list[Photograph]) -> set[str]:
        return {each.name for each in photographs}

    def take(count: int) -> list[Photograph]:
        return [Photograph(f"p/{number}", Path(), (1, 1)) for number in range(count)]

    assert [len(part) for part in split(take(100))] == [85, 15]
    before, after = names(split(take(40))[1]), names(split(take(41))[1])
    assert len(before) == len(after) == 10
    assert len(before - after) <= 1
    with pytest.raises(ValueError, match=r"10 photographs, but 10 are held out: add packages"):
        split(take(10))


def test_scales_are_uniform_in_the_logarithm_and_within_the_photograph(tmp_path: Path):
    side, width, height = 16, 1024, 400
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.arange(width) // 4  # red tells the column
    save(Image.fromarray(pixels), tmp_path / "ramp.png")
    photograph = Photograph("p/ramp", tmp_path / "ramp.png", (height, width))
    crops = Crops([photograph], side, 300, 0, Encoding(), {})
    scales = []
    for entry in crops.list_entries():
        red = np.asarray(Image.open(BytesIO(crops.load(entry, None).data)), float)[..., 0].mean(0)
        scales.append((red[-2] - red[1]) * 4 / (side - 3))
    assert min(scales) == pytest.approx(SMALLEST_SCALE, abs=0.35)
    assert max(scales) == pytest.approx(LARGEST_SCALE, abs=0.5)
    middle = math.sqrt(SMALLEST_SCALE * LARGEST_SCALE)
    assert np.median(scales) == pytest.approx(middle, rel=0.15)


def test_crops_without_detail_are_dropped_and_counted(tmp_path: Path):
    pixels = np.full((800, 800, 3), 200, np.uint8)
    save(Image.fromarray(pixels), tmp_path / "sky.png")
    pixels[:, 400:] = np.random.default_rng(0).integers(0, 255, (800, 400, 3))
    save(Image.fromarray(pixels), tmp_path / "half.png")
    photographs = [
        Photograph(f"p/{name}", tmp_path / f"{name}.png", (800, 800)) for name in ("half", "sky")
    ]
    crops = Crops(photographs, 32, 40, 0, Encoding(), {})
    assert {entry.family for entry in crops.list_entries()} == {"p/half"}
    assert len(crops.list_entries()) == 20
    assert crops.left_out.counts["crop without detail"] > 2 * 80


def test_a_photograph_is_not_enlarged(tmp_path: Path):
    save(paint(0), tmp_path / "small.png")
    small = Photograph("p/small", tmp_path / "small.png", SIZE[::-1])
    large = Photograph("p/large", tmp_path / "small.png", (600, 600))  # never read
    side = round(SMALLEST / SMALLEST_SCALE)
    assert len(Crops([small], side, 2, 0, Encoding(), {}).list_entries()) == 2
    crops = Crops([small], side + 1, 2, 0, Encoding(), {})
    with pytest.raises(ValueError, match=r"--side 321: no photograph has 482 x 482 px or more"):
        crops.list_entries()
    crops = Crops([small, large], side + 1, 0, 0, Encoding(), {})
    crops.list_entries()
    assert crops.left_out.counts == {"photograph smaller than the smallest crop": 1}


def test_a_package_that_cannot_be_had_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"no apt-get: download .* --packages"):
        fetch_packages(tmp_path)
    client = tmp_path / "apt-get"
    client.write_text("#!/bin/sh\necho 'E: Unable to locate package' $2 >&2\nexit 100\n")
    client.chmod(0o755)
    with pytest.raises(ValueError, match=r"\(E: Unable to locate package mate\): run apt-get upd"):
        fetch_packages(tmp_path, ["mate"])
    with pytest.raises(ValueError, match="holds no"):
        find_packages(tmp_path)


def test_damaged_and_repeated_packages_are_refused(archives: Path, tmp_path: Path):
    first = next(archives.iterdir())
    twice = [shutil.copy(first, tmp_path / name) for name in ("a.deb", "b.deb")]
    with pytest.raises(ValueError, match="twice: remove one of them"):
        unpack(twice, tmp_path / "unpacked")
    (tmp_path / "b.deb").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"b\.deb: .*download it again"):
        unpack(twice[1:], tmp_path / "other")
