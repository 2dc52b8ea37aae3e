"""The pictures of sampling show the states that there were, pixel by pixel."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from data_pipelines.building.sources import open_source
from data_pipelines.images.codec import decode_image
from efae.model.sampler import integrate, time_grid
from efae.report.trajectory import draw_filmstrip, draw_trajectory

GAP, LINE = 8, 24
"""Pixels between images, and above them for t."""


def sample_states(channels, steps, count=6):
    """A flow with a closed form: data are a few real images, each velocity is the exact mean."""
    source = open_source({3: "openmoji", 1: "mnist"}[channels])
    entries = source.list_entries()[::600][:7]
    pixels = np.stack([decode_image(source.load(e, 32).data, channels) for e in entries])
    data = torch.from_numpy(pixels) / 127.5 - 1

    def velocity(x, t):
        distance = (x[:, None] - (1 - t) * data).square().sum((2, 3, 4))
        mean = torch.einsum("bn,nchw->bchw", (-distance / (2 * t * t)).softmax(1), data)
        return (x - mean) / t

    states = []
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, channels, 32, 32, generator=generator)
    end = integrate(velocity, noise, time_grid(steps), visit=lambda t, x: states.append((t, x)))
    assert (end[:, None] - data).abs().amax((2, 3, 4)).amin(1).max() < 1e-4, "not a real image"
    return states


def pixels_of(state):
    """(n, h, w, 3) as 8-bit levels."""
    levels = ((state.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    return np.broadcast_to(levels, (*levels.shape[:3], 3))


def read_frames(path):
    with Image.open(path) as image:
        return [
            (np.asarray(frame.convert("RGB")).astype(float), frame.info["duration"])
            for frame in ImageSequence.Iterator(image)
        ]


def cut(page, x, y, side):
    return page[y : y + side, x : x + side]


def enlarge(image, factor):
    return image.repeat(factor, 0).repeat(factor, 1)


@pytest.mark.parametrize(("channels", "error"), [(1, 0), (3, 12)])
def test_gif_shows_every_state_and_ends_in_the_sample(tmp_path, channels, error):
    """Grey exactly; colours within what 256 a frame allow, and on the way 64."""
    states = sample_states(channels, steps=8)
    draw_trajectory(states, tmp_path / "a.gif")
    frames = read_frames(tmp_path / "a.gif")
    assert len(frames) == 8 + 1
    for i, ((page, _), (_, state)) in enumerate(zip(frames, states, strict=True)):
        assert page.shape == (LINE + 96 + 2 * GAP, 6 * (96 + GAP) + GAP, 3)
        for n, expected in enumerate(pixels_of(state)):
            tile = cut(page, GAP + n * (96 + GAP), GAP + LINE, 96)
            assert (tile == enlarge(tile[1::3, 1::3], 3)).all(), "a pixel is not one square"
            if i == 8:
                assert np.abs(tile[::3, ::3] - expected).max() <= error
            distances = [np.abs(tile[::3, ::3] - pixels_of(x)[n]).mean() for _, x in states]
            assert np.argmin(distances) == i
            assert distances[i] < 25
        assert page[: GAP + LINE, :80].min() < 120, "t is written"


def test_gif_starts_at_once_rests_at_the_end_and_repeats(tmp_path):
    draw_trajectory(sample_states(1, steps=8), tmp_path / "a.gif")
    pauses = [pause for _, pause in read_frames(tmp_path / "a.gif")]
    assert max(pauses[:-1]) < 1000 < 2000 <= pauses[-1]
    with Image.open(tmp_path / "a.gif") as image:
        assert image.info["loop"] == 0


def test_gif_of_many_steps_is_small_and_keeps_both_ends(tmp_path):
    states = sample_states(3, steps=50)
    draw_trajectory(states, tmp_path / "a.gif", frames=12)
    frames = read_frames(tmp_path / "a.gif")
    assert len(frames) == 12
    for page, state in ((frames[0][0], states[0][1]), (frames[-1][0], states[-1][1])):
        tile = cut(page, GAP, GAP + LINE, 96)[::3, ::3]
        assert np.abs(tile - pixels_of(state)[0]).mean() < 25
    assert (tmp_path / "a.gif").stat().st_size < 400_000
    draw_trajectory(states, tmp_path / "b.gif", frames=12)
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()


@pytest.mark.parametrize("channels", [1, 3])
def test_filmstrip_is_exact(tmp_path, channels):
    states = sample_states(channels, steps=9)
    draw_filmstrip(states, tmp_path / "a.png", examples=2, columns=4)
    with Image.open(tmp_path / "a.png") as image:
        page = np.asarray(image.convert("RGB"))
    assert page.shape == (LINE + 2 * (96 + GAP) - GAP, 4 * (96 + GAP) - GAP, 3)
    for column, i in enumerate((0, 3, 6, 9)):
        for row, expected in enumerate(pixels_of(states[i][1])[:2]):
            tile = cut(page, column * (96 + GAP), LINE + row * (96 + GAP), 96)
            assert (tile == enlarge(expected, 3)).all()


def test_fewer_states_and_examples_than_asked_for(tmp_path):
    states = sample_states(1, steps=8, count=2)[-2:]
    draw_filmstrip(states, tmp_path / "a.png", examples=6, columns=8)
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (2 * (96 + GAP) - GAP, LINE + 2 * (96 + GAP) - GAP)
    draw_trajectory(states[:1], tmp_path / "a.gif")
    assert len(read_frames(tmp_path / "a.gif")) == 1


def test_images_that_are_large_or_not_square(tmp_path):
    states = [(t, torch.full((1, 3, 60, 110), -t)) for t in (1.0, 0.0)]
    draw_filmstrip(states, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (2 * (110 + GAP) - GAP, LINE + 60)


@pytest.mark.parametrize(
    ("states", "arguments", "message"),
    [
        ([], {}, "0 states of shapes"),
        ([(1.0, torch.zeros(2, 3, 8, 8)), (0.0, torch.zeros(2, 3, 4, 4))], {}, "all of one shape"),
        ([(1.0, torch.zeros(2, 2, 8, 8))], {}, r"\(2, 2, 8, 8\)"),
        ([(1.0, torch.zeros(0, 3, 8, 8))], {}, r"\(0, 3, 8, 8\)"),
        ([(1.0, torch.zeros(3, 8, 8))], {}, r"\(3, 8, 8\)"),
        ([(1.0, torch.zeros(2, 3, 8, 8))], {"examples": 0}, "0 examples"),
    ],
)
@pytest.mark.parametrize("draw", [draw_trajectory, draw_filmstrip])
def test_refusals(tmp_path, draw, states, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(states, tmp_path / "a", **arguments)
    assert not list(tmp_path.iterdir())


def test_two_states_are_the_fewest(tmp_path):
    states = [(t, torch.zeros(1, 1, 8, 8)) for t in (1.0, 0.0)]
    with pytest.raises(ValueError, match="1 states to draw"):
        draw_trajectory(states, tmp_path / "a.gif", frames=1)
    with pytest.raises(ValueError, match="1 states to draw"):
        draw_filmstrip(states, tmp_path / "a.png", columns=1)
