import gzip
import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image
from webdataset.writer import TarWriter

from data_pipelines import ShardDataset
from data_pipelines.build_shards import build_shards
from data_pipelines.building.sample_encoding import Encoding
from data_pipelines.building.sources import open_source
from data_pipelines.images.codec import decode_image, encode_png
from data_pipelines.shards.index import load_index
from data_pipelines.shards.intake import SourceFaults, Tolerance


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

    def test_two_files_of_one_stem_get_keys_of_their_own_and_stay_one_family(self, tmp_path):
        for number, name in enumerate(("x.png", "x.bmp", "x_png.gif", "y.z.png", "y_z.png")):
            save(draw(4, 4, seed=number), tmp_path / name)
        entries = open_source(f"folder:{tmp_path}").list_entries()
        keys = {entry.place: entry.key for entry in entries}
        assert len(set(keys.values())) == 5
        assert keys["x.bmp"] == "x_bmp"
        assert len(keys["x.png"]) == len(keys["x_png.gif"]) == 32
        families = {entry.place: entry.family for entry in entries}
        assert families["x.png"] == families["x.bmp"] == "x"
        assert families["x_png.gif"] == "x_png"

    def test_nothing_is_left_out_without_a_word(self, tmp_path):
        for name in ("a.jpg", "b.jfif", "c.JPE", "cats/d.png"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            Image.fromarray(draw(4, 4, 3)).save(
                tmp_path / name, "PNG" if name.endswith("png") else "JPEG"
            )
        for name in (
            *("._a.jpg", "__MACOSX/a.jpg", ".DS_Store", "Thumbs.db"),
            *(".ipynb_checkpoints/a.jpg", "@eaDir/a.jpg/thumb.jpg", ".Trash-1000/files/a.jpg"),
            *("$Recycle.Bin/S-1/$R1.jpg", "@Recycle/a.jpg", ".stversions/a.jpg"),
            *("notes.txt", "more.txt", "README", "IMG_1.HEIC", "raw.nef"),
            *("set/contact_sheet.png", "set/statistics.json"),
        ):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"x")
        elsewhere = tmp_path.with_name(f"{tmp_path.name}-elsewhere")
        save(draw(4, 4), elsewhere / "e.png")
        (tmp_path / "dogs").symlink_to(elsewhere)
        (tmp_path / "up").symlink_to(tmp_path)
        (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
        source = open_source(f"folder:{tmp_path}")
        assert [e.key for e in source.list_entries()] == ["a", "b", "c", "cats/d", "dogs/e"]
        assert source.left_out.counts == {
            "macOS metadata": 3,
            "Windows metadata": 1,
            "notebook checkpoint": 1,
            "NAS thumbnail": 1,
            "deleted file": 3,
            "file of a synchroniser": 1,
            "not an image file (.txt)": 2,
            "not an image file (no extension)": 1,
            "not an image file (.json)": 1,
            "picture of a shard set": 1,
            "link to a folder above it": 1,
        }
        assert "2 x not an image file (.txt) (such as more.txt)" in str(source.left_out)
        assert [fault.rpartition("/")[2] for fault in source.faults] == [
            "IMG_1.HEIC: .heic files are not supported: convert it, for example to JPEG",
            "raw.nef: .nef files are not supported: convert it, for example to JPEG",
            "gone.jpg: broken link",
        ]

    def test_the_output_is_no_part_of_the_source(self, tmp_path):
        save(draw(4, 4), tmp_path / "a.png")
        for name in ("one", "two"):
            build_shards(f"folder:{tmp_path}", f"{tmp_path}/{name}")
            assert load_index(f"{tmp_path}/{name}").shards[0].keys == ["a"]
            assert "nothing to do" in build_shards(f"folder:{tmp_path}", f"{tmp_path}/{name}")
        left_out = load_index(f"{tmp_path}/two").provenance["left_out"]
        assert left_out["picture of a shard set"] == {
            "count": 1,
            "example": "one/contact_sheet.png",
        }

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

    @staticmethod
    def write_labels(path, labels):
        path.write_bytes(b"\0\0\x08\x01" + np.array([len(labels)], ">i4").tobytes() + bytes(labels))

    def test_a_folder_means_its_train_file(self, tmp_path):
        self.write(tmp_path / "t10k-images-idx3-ubyte.gz", draw(2, 6, 6, seed=1))
        self.write(tmp_path / "train-images-idx3-ubyte.gz", draw(3, 6, 6))
        images = load_all(f"idx:{tmp_path}")
        assert list(images) == ["train-000000", "train-000001", "train-000002"]
        left_out = open_source(f"idx:{tmp_path}").left_out
        assert left_out.examples == {"other idx file of the folder": "t10k-images-idx3-ubyte.gz"}
        assert (np.stack(list(images.values()))[:, 0] == draw(3, 6, 6)).all()
        assert next(iter(load_all(f"idx:{tmp_path}/t10k-images-idx3-ubyte.gz"))) == "t10k-000000"

    def test_small_images_are_padded_in_the_middle(self, tmp_path):
        self.write(tmp_path / "train-images-idx3-ubyte", draw(1, 6, 6))
        image = load_all(f"idx:{tmp_path}", 10)["train-000000"][0]
        assert (image[2:8, 2:8] == draw(1, 6, 6)[0]).all()
        assert image.sum() == draw(1, 6, 6).sum()

    def test_labels_beside_the_images_become_cls(self, tmp_path):
        self.write(tmp_path / "train-images-idx3-ubyte.gz", draw(3, 6, 6))
        build_shards(f"idx:{tmp_path}", f"{tmp_path}/bare")
        self.write_labels(tmp_path / "train-labels-idx1-ubyte", [7, 0, 12])
        source = open_source(f"idx:{tmp_path}")
        labels = [source.load(entry, None).others for entry in source.list_entries()]
        assert labels == [{"cls": b"7"}, {"cls": b"0"}, {"cls": b"12"}]
        with pytest.raises(ValueError, match="labels None instead of 'train-labels-idx1-ubyte as"):
            build_shards(f"idx:{tmp_path}", f"{tmp_path}/bare")

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda data: data[:-1], "not an idx1 file of uint8 labels, or cut off"),
            (lambda data: data[:7] + b"\2" + data[8:-1], "2 labels beside 3 images"),
        ],
    )
    def test_unsound_labels_are_refused(self, tmp_path, spoil, message):
        self.write(tmp_path / "train-images-idx3-ubyte", draw(3, 6, 6))
        path = tmp_path / "train-labels-idx1-ubyte"
        self.write_labels(path, [1, 2, 3])
        path.write_bytes(spoil(path.read_bytes()))
        with pytest.raises(ValueError, match=f"train-labels-idx1-ubyte: {message}"):
            load_all(f"idx:{tmp_path}")

    def test_without_labels_an_older_set_stays_complete(self, tmp_path):
        self.write(tmp_path / "train-images-idx3-ubyte", draw(3, 6, 6))
        assert open_source(f"idx:{tmp_path}").describe().keys() == {"files"}

    def test_a_file_cut_off_is_refused(self, tmp_path):
        path = tmp_path / "train-images-idx3-ubyte"
        self.write(path, draw(3, 6, 6))
        path.write_bytes(gzip.decompress(path.read_bytes())[:-1])
        with pytest.raises(ValueError, match="not an idx3 file of uint8 images, or cut off"):
            load_all(f"idx:{path}")


class TestForeignTars:
    @staticmethod
    def write(path, *samples):
        with path.open("wb") as file, TarWriter(file, mtime=0, encoder=False) as writer:
            for key, members in samples:
                writer.write({"__key__": key, **members})

    def test_are_read_by_their_keys_with_every_other_member(self, tmp_path):
        kept = {"cls": b"3", "json": b'{"a": [1]}', "txt": "größe\n".encode(), "seg.bin": b"\0\xff"}
        self.write(
            tmp_path / "x.tar",
            ("dir/one", {"png": encode_png(draw(4, 4)), **kept}),
            ("../two", {"seg.png": encode_png(draw(4, 4, seed=2))}),
        )
        images = load_all(f"wds:{tmp_path}")
        assert list(images) == ["dir/one", "__/two"]
        assert (images["__/two"][0] == draw(4, 4, seed=2)).all()
        source = open_source(f"wds:{tmp_path}")
        one, two = (source.load(entry, 2) for entry in source.list_entries())
        assert (one.others, two.others) == (kept, {})

    def test_a_built_set_has_the_members_byte_for_byte(self, tmp_path):
        kept = {"cls": b" 7\n", "json": b"{}", "seg.png": encode_png(draw(4, 4, seed=3))}
        self.write(
            tmp_path / "a.tar",
            *((f"k{n}", {"png": encode_png(draw(4, 4, 3, seed=n)), **kept}) for n in range(5)),
        )
        build_shards(f"wds:{tmp_path}", f"{tmp_path}/set", resolution=3, samples_per_shard=2)
        index = load_index(f"{tmp_path}/set")
        for shard in index.shards:
            data = (tmp_path / "set" / shard.name).read_bytes()
            assert shard.members.keys() == {"png", *kept}
            for extension, content in kept.items():
                members = shard.members[extension]
                for offset, size in zip(members.offset, members.size, strict=True):
                    assert data[offset : offset + size] == content
        assert index.image_shape == (3, 3, 3)

    def test_equal_keys_of_two_tars_are_refused(self, tmp_path):
        for name in ("a", "b"):
            self.write(tmp_path / f"{name}.tar", ("same", {"png": encode_png(draw(4, 4))}))
        with pytest.raises(ValueError, match=r"'same' of a\.tar and sample 'same' of b\.tar"):
            build_shards(f"wds:{tmp_path}", f"{tmp_path}/set")

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("y.cls", "sample 'y' has no image member"),
            ("x", "member 'x' has no extension"),
            ("x._hidden", "member 'x._hidden' cannot be kept"),
        ],
    )
    def test_samples_that_cannot_be_taken_are_faults(self, tmp_path, name, said):
        image = encode_png(draw(4, 4))
        self.write(tmp_path / "a.tar", ("x", {"png": image}), ("z", {"png": image}))
        self.write(tmp_path / "b.tar", ("good", {"png": image}))
        with tarfile.open(tmp_path / "a.tar", "a") as tar:
            tar.addfile(tarfile.TarInfo(name))
        source = open_source(f"wds:{tmp_path}")
        keys = [entry.key for entry in source.list_entries()]
        assert keys == (["x", "z", "good"] if name[0] == "y" else ["z", "good"])
        assert len(source.faults) == 1
        assert source.faults[0].startswith(f"a.tar: {said}")
        assert not source.left_out.counts
        pickled = pickle.loads(pickle.dumps(source))
        assert pickled.load(source.list_entries()[-1], None).data == image

    def test_members_that_cannot_lie_in_one_sample_are_faults(self, tmp_path):
        image = encode_png(draw(4, 4))
        two, first = {"jpg": image, "png": image}, {"gif": image, "jpg": image}
        samples = ("x", two), ("y", two), ("z", first), ("good", {"jpg": image, "cls": b"1"})
        self.write(tmp_path / "a.tar", *samples)
        with pytest.raises(SourceFaults) as error:
            build_shards(f"wds:{tmp_path}", f"{tmp_path}/set", resolution=2)
        assert sorted(error.value.faults) == [
            *(f"sample '{key}' of a.tar: has two members .png: remove one" for key in "xy"),
            "sample 'z' of a.tar: readers would mistake another member for its image: rename it, or"
            " choose another --encoding",
        ]
        tolerance = Tolerance(3)
        build_shards(f"wds:{tmp_path}", f"{tmp_path}/set", resolution=2, tolerance=tolerance)
        assert sorted(ShardDataset.open(f"{tmp_path}/set").keys) == ["good"]

    def test_a_mended_tar_of_the_same_size_is_taken_as_it_is_now(self, tmp_path):
        image = encode_png(draw(4, 4))
        files = {key: {"png": image} for key in "abcd"}
        self.write(tmp_path / "a.tar", *{**files, "c": {"txt": image}}.items())
        size = (tmp_path / "a.tar").stat().st_size
        with pytest.raises(SourceFaults, match="'c' has no image"):
            build_shards(f"wds:{tmp_path}", f"{tmp_path}/set", samples_per_shard=1)
        self.write(tmp_path / "a.tar", *files.items())
        assert (tmp_path / "a.tar").stat().st_size == size
        build_shards(f"wds:{tmp_path}", f"{tmp_path}/set", samples_per_shard=1)
        assert sorted(ShardDataset.open(f"{tmp_path}/set").keys) == ["a", "b", "c", "d"]

    def test_a_tar_changed_after_it_was_listed_is_noticed(self, tmp_path):
        self.write(tmp_path / "a.tar", ("x", {"png": encode_png(draw(4, 4)), "cls": b"1"}))
        source = open_source(f"wds:{tmp_path}")
        entries = source.list_entries()
        self.write(tmp_path / "a.tar", ("x", {"png": encode_png(draw(4, 4)), "cls": b"2"}))
        with pytest.raises(ValueError, match=r"\.cls of sample 'x' of a\.tar changed"):
            source.load(entries[0], None)

    def test_an_older_set_without_members_is_refused(self, tmp_path):
        self.write(tmp_path / "a.tar", ("x", {"png": encode_png(draw(4, 4)), "cls": b"1"}))
        build_shards(f"wds:{tmp_path}", f"{tmp_path}/set")
        forget(tmp_path / "set/index.json", "members")
        with pytest.raises(ValueError, match=r"members None instead of 'all'.*delete that one"):
            build_shards(f"wds:{tmp_path}", f"{tmp_path}/set")


def forget(path, name):
    """Make an index one that was built before `name` was part of the fingerprint."""
    tree = json.loads(path.read_text())
    del tree["provenance"]["fingerprint"][name]
    path.write_text(json.dumps(tree))


class TestEncoding:
    def test_jpeg_is_what_a_resized_image_becomes(self, tmp_path):
        smooth = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
        save(np.stack([smooth, 127 - smooth, smooth], axis=-1), tmp_path / "in/a.png")
        save(smooth, tmp_path / "in/b.png")
        sizes = []
        # Twice what libjpeg-turbo loses on these ramps (8 and 5 levels), for other versions of it;
        # planes that changed places would be off by a hundred.
        for quality, tolerance in ((50, 16), (95, 10)):
            source = open_source(f"folder:{tmp_path}/in", Encoding("jpeg", quality))
            colour, grey = (source.load(entry, 32) for entry in source.list_entries())
            assert (colour.extension, colour.shape, grey.shape) == ("jpg", (3, 32, 32), (1, 32, 32))
            sizes.append(len(colour.data))
            png = open_source(f"folder:{tmp_path}/in")
            for image, entry in zip((colour, grey), png.list_entries(), strict=True):
                channels = image.shape[0]
                exact = decode_image(png.load(entry, 32).data, channels).astype(int)
                assert abs(decode_image(image.data, channels) - exact).max() <= tolerance
        assert sizes[0] < sizes[1]

    def test_is_part_of_what_a_set_is_built_from(self, tmp_path):
        save(draw(4, 4), tmp_path / "in/a.png")
        source, output = f"folder:{tmp_path}/in", f"{tmp_path}/set"
        build_shards(source, output, encoding=Encoding("jpeg"))
        assert load_index(output).shards[0].members.keys() == {"jpg"}
        assert "nothing to do" in build_shards(source, output, encoding=Encoding("jpeg"))
        with pytest.raises(ValueError, match="quality 95 instead of 80"):
            build_shards(source, output, encoding=Encoding("jpeg", 80))
        with pytest.raises(ValueError, match="encoding 'jpeg' instead of None"):
            build_shards(source, output)

    @pytest.mark.parametrize("options", [{"name": "gif"}, {"quality": 0}, {"quality": 101}])
    def test_nonsense_is_refused(self, options):
        with pytest.raises(ValueError, match=f" {next(iter(options.values()))}: "):
            Encoding(**options)


def test_openmoji_keeps_the_skin_tones_of_a_drawing_together():
    source = open_source("openmoji")
    # A set of an older version is complete as long as this, and its fingerprint, stay as they are.
    assert source.describe().keys() == {"package", "licence", "credit"}
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
    first = source.load(entries[0], 32)
    assert first.others == {"cls": b"0"}
    assert source.load(entries[-1], None).others == {"cls": b"9"}
    image = decode_image(first.data, 1)
    assert image.shape == (1, 32, 32)
    assert image[0, 8:24, 8:24].max() > 200
    assert image[0, :2].max() == 0
