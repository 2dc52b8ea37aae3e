import gzip
import io

import numpy as np
import pytest
from PIL import Image
from webdataset.writer import TarWriter

from data_pipelines.image_codec import decode_image, encode_png
from data_pipelines.image_sources import check_keys, open_source


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(image: np.ndarray, path, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)


def load_all(text: str, resolution: int | None = None) -> dict[str, np.ndarray]:
    source = open_source(text)
    images = {}
    for entry in source.list_entries():
        encoded = source.load(entry, resolution)
        images[entry.key] = decode_image(encoded.data, encoded.shape[0])
        assert images[entry.key].shape == encoded.shape
    return images


@pytest.mark.parametrize("text", ["", "openmojis", "folder:", "pickle:x", "cifar"])
def test_an_unknown_source_gets_the_list(text):
    with pytest.raises(ValueError, match="folder:PATH, idx:PATH, wds:URI, openmoji, mnist"):
        open_source(text)


@pytest.mark.parametrize("kind", ["folder", "idx", "wds"])
def test_a_missing_path_is_named(kind, tmp_path):
    with pytest.raises((ValueError, OSError), match="nowhere"):
        open_source(f"{kind}:{tmp_path}/nowhere")


@pytest.mark.parametrize("kind", ["folder", "idx", "wds"])
def test_an_empty_folder_is_refused(kind, tmp_path):
    with pytest.raises(ValueError, match="holds no"):
        open_source(f"{kind}:{tmp_path}")


class TestFolder:
    def test_keeps_lossless_pixels_and_jpeg_bytes(self, tmp_path):
        save(draw(5, 7, 3), tmp_path / "b/photo.v2.png")
        save(draw(6, 4), tmp_path / "a.bmp")
        save(draw(9, 9, 3), tmp_path / "c.JPG", quality=80)
        (tmp_path / "notes.txt").write_text("not an image")
        source = open_source(f"folder:{tmp_path}")
        images = load_all(f"folder:{tmp_path}")
        assert list(images) == ["a", "b/photo_v2", "c"]
        assert (images["b/photo_v2"] == draw(5, 7, 3).transpose(2, 0, 1)).all()
        assert (images["a"] == draw(6, 4)[None]).all()
        encoded = source.load(source.list_entries()[2], None)
        assert (encoded.extension, encoded.data) == ("jpg", (tmp_path / "c.JPG").read_bytes())

    def test_resizes_the_centre_square(self, tmp_path):
        wide = np.zeros((32, 64, 3), np.uint8)
        wide[:, 16:48] = (200, 100, 50)
        save(wide, tmp_path / "wide.png")
        image = load_all(f"folder:{tmp_path}", 8)["wide"]
        assert image.shape == (3, 8, 8)
        assert abs(image - np.array([200.0, 100.0, 50.0])[:, None, None]).max() < 20

    def test_turns_photographs_upright(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was turned: show it rotated clockwise
        pixels = np.zeros((8, 16, 3), np.uint8)
        pixels[:, :8] = 255
        save(pixels, tmp_path / "turned.jpg", exif=exif, quality=95)
        image = load_all(f"folder:{tmp_path}")["turned"]
        assert image.shape == (3, 16, 8)
        assert image[:, :6].min() > 200
        assert image[:, 10:].max() < 50

    def test_lays_transparency_on_white(self, tmp_path):
        save(np.zeros((4, 4, 4), np.uint8), tmp_path / "clear.png")
        assert (load_all(f"folder:{tmp_path}")["clear"] == 255).all()

    def test_refuses_two_files_of_one_key(self, tmp_path):
        save(draw(4, 4), tmp_path / "x.png")
        save(draw(4, 4), tmp_path / "x.bmp")
        with pytest.raises(ValueError, match=r"key 'x': x\.bmp and x\.png"):
            check_keys(open_source(f"folder:{tmp_path}").list_entries())

    @pytest.mark.parametrize("name", ["broken.jpg", "broken.png", "deep.png"])
    def test_names_a_file_it_cannot_read(self, tmp_path, name):
        data = io.BytesIO()
        if name == "deep.png":
            Image.fromarray(draw(8, 8).astype(np.uint16)).save(data, "PNG")
            (tmp_path / name).write_bytes(data.getvalue())
        else:
            Image.fromarray(draw(64, 64, 3)).save(data, "JPEG" if name[-3:] == "jpg" else "PNG")
            (tmp_path / name).write_bytes(data.getvalue()[:600])
        with pytest.raises(ValueError, match=rf"{name}: .*remove or replace it"):
            load_all(f"folder:{tmp_path}")


class TestIdx:
    @staticmethod
    def write(path, images):
        header = b"\0\0\x08\x03" + np.array(images.shape, ">i4").tobytes()
        path.write_bytes(gzip.compress(header + images.tobytes()))

    def test_a_folder_means_its_train_file(self, tmp_path):
        self.write(tmp_path / "t10k-images-idx3-ubyte.gz", draw(2, 6, 6, seed=1))
        self.write(tmp_path / "train-images-idx3-ubyte.gz", draw(3, 6, 6))
        images = load_all(f"idx:{tmp_path}")
        assert list(images) == ["train-000000", "train-000001", "train-000002"]
        assert (np.stack(list(images.values()))[:, 0] == draw(3, 6, 6)).all()
        assert next(iter(load_all(f"idx:{tmp_path}/t10k-images-idx3-ubyte.gz"))) == "t10k-000000"

    def test_small_images_are_padded_in_the_middle(self, tmp_path):
        self.write(tmp_path / "train-images-idx3-ubyte", draw(1, 6, 6))
        image = load_all(f"idx:{tmp_path}", 10)["train-000000"][0]
        assert (image[2:8, 2:8] == draw(1, 6, 6)[0]).all()
        assert image.sum() == draw(1, 6, 6).sum()

    def test_a_file_cut_off_is_refused(self, tmp_path):
        path = tmp_path / "train-images-idx3-ubyte"
        self.write(path, draw(3, 6, 6))
        path.write_bytes(gzip.decompress(path.read_bytes())[:-1])
        with pytest.raises(ValueError, match="not an idx3 file of uint8 images, or cut off"):
            load_all(f"idx:{path}")


def test_foreign_tars_are_read_by_their_keys(tmp_path):
    with (tmp_path / "x.tar").open("wb") as file, TarWriter(file, encoder=False) as writer:
        writer.write({"__key__": "dir/one", "png": encode_png(draw(4, 4)), "cls": b"3"})
        writer.write({"__key__": "../two", "seg.png": encode_png(draw(4, 4, seed=2))})
    images = load_all(f"wds:{tmp_path}")
    assert list(images) == ["dir/one", "__/two"]
    assert (images["__/two"][0] == draw(4, 4, seed=2)).all()


def test_openmoji_keeps_the_skin_tones_of_a_drawing_together():
    source = open_source("openmoji")
    entries = source.list_entries()
    assert len(entries) == 4495
    assert len({entry.key for entry in entries}) == 4495
    waving = [entry.key for entry in entries if entry.family == "1F44B"]
    assert sorted(waving) == ["1F44B", *(f"1F44B-1F3F{tone}" for tone in "BCDEF")]
    heart = next(entry for entry in entries if entry.key == "2764")
    image = decode_image(source.load(heart, 32).data, 3)
    assert image.shape == (3, 32, 32)
    assert (image[:, 0, 0] == 255).all()
    assert image[0, 16, 16] > 200  # a red heart
    assert image[1:, 16, 16].max() < 120
    assert source.load(heart, None).shape == (3, 72, 72)


def test_mnist_has_its_digits():
    source = open_source("mnist")
    entries = source.list_entries()
    assert len(entries) == 5000
    image = decode_image(source.load(entries[0], 32).data, 1)
    assert image.shape == (1, 32, 32)
    assert image[0, 8:24, 8:24].max() > 200
    assert image[0, :2].max() == 0
