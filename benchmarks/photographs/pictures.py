"""Photographs of unpacked packages: selected from all pictures, and split into two sets."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from benchmarks.photographs.packages import PACKAGES, Unpacked
from data_pipelines.images.codec import decode_image, read_shape
from data_pipelines.shards.intake import LeftOut

HELD_OUT_SHARE, LEAST_HELD_OUT = 0.15, 10
SMALLEST = 480
"""Shorter side, in pixels, of the smallest photograph."""
MOST_EQUAL = 0.66
"""Share of pixels that equal their neighbour; flat drawings exceed it, photographs reach 0.65."""
SAME = 0.97
"""Correlation of thumbnails above which two files show one picture; others reach 0.92."""
_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
_ROOTS = ("usr/share/backgrounds/", "usr/share/wallpapers/", "usr/share/")


@dataclass(frozen=True)
class Photograph:
    """A photograph of a package."""

    name: str
    """Package, and path below its folder of wallpapers without the extension."""
    path: Path
    size: tuple[int, int]
    """(height, width)."""

    @property
    def shorter(self) -> int:
        """Length of the shorter side."""
        return min(self.size)

    def read(self) -> Image.Image:
        """Decode it."""
        return Image.fromarray(decode_image(self.path.read_bytes(), 3).transpose(1, 2, 0))


def find_photographs(packages: Sequence[Unpacked]) -> tuple[list[Photograph], LeftOut]:
    """Return the photographs in the order of their names, and the pictures that were dropped."""
    dropped = LeftOut()
    largest: dict[str, Photograph] = {}
    for package in packages:
        for picture in _list_pictures(package, dropped):
            other = largest.setdefault(picture.name, picture)
            if other is not picture:
                smaller, larger = sorted((picture, other), key=lambda each: each.shorter)
                largest[picture.name] = larger
                dropped.add("another size of a picture", f"{picture.name}: {smaller.path.name}")
    kept: dict[str, tuple[Photograph, np.ndarray]] = {}
    # The largest first, so that the smaller of two duplicates is dropped.
    for photograph in sorted(largest.values(), key=lambda each: (-each.shorter, each.name)):
        try:
            pixels = photograph.read()
        except ValueError:
            dropped.add("unreadable picture", photograph.name)
            continue
        thumbnail = _draw_thumbnail(pixels)
        if _share_of_equal_neighbours(np.asarray(pixels)) > MOST_EQUAL:
            dropped.add("flat drawing", photograph.name)
        elif any(np.mean(thumbnail * other) > SAME for _, other in kept.values()):
            dropped.add("duplicate under another name", photograph.name)
        else:
            kept[photograph.name] = photograph, thumbnail
    return [kept[name][0] for name in sorted(kept)], dropped


def split(photographs: Sequence[Photograph]) -> tuple[list[Photograph], list[Photograph]]:
    """Split photographs into (train, held out) by a hash of package and name.

    Raises:
        ValueError: There are too few of them.
    """
    held_out = max(LEAST_HELD_OUT, round(HELD_OUT_SHARE * len(photographs)))
    if held_out >= len(photographs):
        raise ValueError(
            f"the packages hold {len(photographs)} photographs, but {held_out} are held out: add"
            " packages"
        )
    ordered = sorted(photographs, key=lambda each: _hash(f"held out {each.name}"))
    sets = ordered[held_out:], ordered[:held_out]
    train, held = (sorted(each, key=lambda photograph: photograph.name) for each in sets)
    return train, held


def _list_pictures(package: Unpacked, dropped: LeftOut) -> Iterator[Photograph]:
    """Yield pictures that may be photographs; the files of one Plasma wallpaper share its name."""
    known = PACKAGES.get(package.name)
    for path in sorted(package.folder.rglob("*")):
        if path.suffix.lower() not in _EXTENSIONS or not path.is_file():
            continue
        name = _name(path.relative_to(package.folder))
        if path.is_symlink():
            dropped.add("link to a picture", name)
        elif known and any(fnmatch(name, pattern) for pattern in known.drawings):
            dropped.add("drawing by name", name)
        else:
            try:
                _, *size = read_shape(path.read_bytes())
            except ValueError:
                dropped.add("unreadable picture", name)
                continue
            if min(size) < SMALLEST:
                dropped.add(f"picture smaller than {SMALLEST} px", name)
            else:
                yield Photograph(f"{package.name}/{name}", path, (size[0], size[1]))


def _name(path: Path) -> str:
    """Return the path below the folder of wallpapers, or the name of the Plasma wallpaper."""
    text = path.as_posix()
    text = next((text.removeprefix(root) for root in _ROOTS if text.startswith(root)), text)
    theme, contents, _ = text.partition("/contents/")
    return theme if contents else str(PurePosixPath(text).with_suffix(""))


def _draw_thumbnail(pixels: Image.Image) -> np.ndarray:
    """Return 16 x 16 grey values of the centre square, normalised for correlation."""
    side = min(pixels.size)
    left, top = (pixels.width - side) / 2, (pixels.height - side) / 2
    grey = pixels.convert("L").resize(
        (16, 16), Image.Resampling.BOX, box=(left, top, left + side, top + side)
    )
    values = np.asarray(grey, np.float64)
    return (values - values.mean()) / max(values.std(), 1e-6)


def _share_of_equal_neighbours(pixels: np.ndarray) -> float:
    return float(np.mean(np.all(pixels[:, 1:] == pixels[:, :-1], axis=2)))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
