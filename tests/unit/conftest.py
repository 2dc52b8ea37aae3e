"""A small shard set on local files."""

import numpy as np
import pytest
from PIL import Image

from data_pipelines.build_shards import build_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """23 images of 8 x 8; all pixels of image n are n."""
    path = tmp_path_factory.mktemp("images")
    for number in range(23):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(path / f"n{number:02d}.png")
    return path


@pytest.fixture
def shards(folder, tmp_path):
    uri = f"{tmp_path}/set"
    build_shards(f"folder:{folder}", uri, samples_per_shard=5)
    return uri
