"""Crops of photographs, as a source of `data_pipelines.build_shards`."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.photographs.pictures import Photograph
from data_pipelines.building.sample_encoding import EncodedImage, Encoding, Entry, make_key
from data_pipelines.shards.intake import LeftOut

SMALLEST_SCALE, LARGEST_SCALE = 1.5, 14.0
"""Bounds of a crop's side in the photograph, divided by its side in the set."""
LEAST_DETAIL = 3.0
"""Mean difference of neighbouring pixels, of 255, below which a crop is dropped: skies, and what is
out of focus."""
_TRIES = 8
"""Most crops that are drawn for each that is asked for."""


class Crops:
    """Crops of photographs, equally many of each, with scales that are uniform in the logarithm.

    Implements `data_pipelines.building.sources.SampleSource`. A crop's key is its photograph and
    its number. Crops without detail are dropped and replaced, up to eight draws per crop, so a
    photograph that is mostly sky may give fewer. Crops of a set are held in memory, encoded: 370 MB
    for 4,200 of 256 px.
    """

    def __init__(
        self,
        photographs: Sequence[Photograph],
        side: int,
        crops: int,
        seed: int,
        encoding: Encoding,
        versions: Mapping[str, str],
    ):
        self.left_out, self.reasons, self.faults = LeftOut(), LeftOut(), list[str]()
        self._photographs = photographs
        self._side, self._crops, self._seed = side, crops, seed
        self._encoding, self._versions = encoding, versions
        self._images: dict[str, EncodedImage] = {}

    def describe(self) -> dict[str, Any]:
        names = [photograph.name for photograph in self._photographs]
        return {
            **self._encoding.describe(),
            "packages": dict(self._versions),
            "photographs": names,
            "side": self._side,
            "crops": self._crops,
            "seed": self._seed,
            "scales": [SMALLEST_SCALE, LARGEST_SCALE],
            "least_detail": LEAST_DETAIL,
        }

    def list_entries(self) -> list[Entry]:
        """Cut all crops, and list them.

        Raises:
            ValueError: Every photograph is too small.
        """
        usable = [each for each in self._photographs if each.shorter >= SMALLEST_SCALE * self._side]
        if not usable:
            least = math.ceil(SMALLEST_SCALE * self._side)
            raise ValueError(f"--side {self._side}: no photograph has {least} x {least} px or more")
        for photograph in self._photographs:
            if photograph not in usable:
                self.left_out.add("photograph smaller than the smallest crop", photograph.name)
        entries: list[Entry] = []
        with ThreadPoolExecutor(2) as pool:  # decoding and resampling release the GIL
            counts = _share(self._crops, len(usable))
            results = pool.map(self._cut, usable, counts)
            for photograph, (images, dropped) in zip(usable, results, strict=True):
                if dropped:
                    self.left_out.add("crop without detail", photograph.name, dropped)
                self._images.update(images)
                entries += [Entry(key, photograph.name, key) for key in images]
        return entries

    def load(self, entry: Entry, resolution: int | None) -> EncodedImage:
        return self._images[entry.place]

    def _cut(self, photograph: Photograph, count: int) -> tuple[dict[str, EncodedImage], int]:
        """Return `count` crops of a photograph by key, and the number of those without detail."""
        pixels = photograph.read()
        seed = hashlib.sha256(f"{self._seed} {self._side} {photograph.name}".encode()).digest()
        random = np.random.default_rng(list(seed))
        largest = min(LARGEST_SCALE, photograph.shorter / self._side)
        images: dict[str, EncodedImage] = {}
        for number in range(_TRIES * count):
            scale = math.exp(random.uniform(math.log(SMALLEST_SCALE), math.log(largest)))
            side = min(round(scale * self._side), photograph.shorter)
            left = int(random.integers(pixels.width - side + 1))
            top = int(random.integers(pixels.height - side + 1))
            box = (left, top, left + side, top + side)
            crop = pixels.resize((self._side, self._side), Image.Resampling.LANCZOS, box=box)
            values = np.asarray(crop)
            if _measure_detail(values) >= LEAST_DETAIL:
                images[make_key(f"{photograph.name}-{number:05d}")] = self._encoding.encode(values)
            if len(images) == count:
                return images, number + 1 - count
        return images, _TRIES * count - len(images)


def _measure_detail(values: np.ndarray) -> float:
    """Return the mean absolute difference of neighbouring pixels (h, w, c)."""
    wide = values.astype(np.int16)
    return float(sum(np.abs(np.diff(wide, axis=axis)).mean() for axis in (0, 1)) / 2)


def _share(total: int, parts: int) -> list[int]:
    """Split `total` into `parts` whole numbers that differ by at most 1."""
    return [total // parts + (number < total % parts) for number in range(parts)]
