"""The page in a headless Chromium without network: its numbers are PyTorch's."""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
from PIL import Image

import efae
from efae.model.autoencoder import Autoencoder
from efae.presets import PRESETS
from efae.symmetry import D4
from efae.web_page import page
from jobs import export
from tests.integration.browser import Tab

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1200)]

PHOTOGRAPH = Path(sklearn.datasets.__file__).parent / "images/flower.jpg"
TIMES = "\N{MULTIPLICATION SIGN}"
IS_DONE = "efaePage.run > 0 && efaePage.done === efaePage.run"
STATUS = "document.getElementById('status')?.textContent"
IS_FAULT = "document.getElementById('status')?.className === 'fault'"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def folder(tmp_path_factory, vae) -> Path:
    """The page of the builtin model, beside a conventional autoencoder."""
    folder = tmp_path_factory.mktemp("page")
    arguments = ["--model", "builtin:openmoji-32", "--format", "page", "--credit", "A credit."]
    compare = ["--compare", f"diffusers:{vae}", "--output", str(folder)]
    assert export.main([*arguments, *compare]) == 0
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """The page of a model for images of any size, with cells of 8 px and random weights.

    It has the runtime for GPUs, as if its programs were large, too.
    """
    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    model = Autoencoder(PRESETS["photographs_64"][1]).eval().requires_grad_(False)
    for weight in model.parameters():  # a new decoder gives zeros
        weight += 0.01 * torch.randn_like(weight)
    model.save_pretrained(folder / "model")
    arguments = ["--model", str(folder / "model"), "--format", "page"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "GPU_BYTES", 1)
        assert export.main([*arguments, "--output", str(folder / "page")]) == 0
    return folder / "page"


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve a folder; yield its address."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def address(folder) -> Iterator[str]:
    with serve(folder) as address:
        yield address


@pytest.fixture
def tab(tmp_path) -> Iterator[Tab]:
    tab = Tab(tmp_path / "profile")
    yield tab
    tab.close()


def read(tab: Tab, name: str, model: int = 0) -> torch.Tensor:
    array = f"efaePage.models[{model}].{name}"
    data = tab.evaluate(f"Array.from({array}.data)")
    return torch.tensor(data).view(1, *tab.evaluate(f"{array}.shape"))


def open_page(tab: Tab, address: str) -> None:
    tab.open(address)
    tab.wait(f"typeof efaePage === 'object' && ({IS_DONE} || {IS_FAULT})")
    assert not tab.evaluate(IS_FAULT), tab.evaluate(STATUS)


def test_all_eight_elements_give_the_numbers_of_pytorch(tab, address):
    model = efae.load("builtin:openmoji-32")
    tab.resize(1280, 900)
    open_page(tab, address)
    for given in ("drawing", "photograph"):
        if given == "photograph":
            tab.choose_file("#file", PHOTOGRAPH)
            tab.wait(f"{STATUS}.startsWith('flower.jpg: 640 {TIMES} 427 pixels, scaled')")
        image, noise = read(tab, "image"), read(tab, "noise")
        assert image.std() > 0.1
        assert 0.9 < noise.std() < 1.1
        latent = model.encode(image)
        torch.testing.assert_close(read(tab, "latent"), latent, atol=1e-3, rtol=0)
        for number, element in enumerate(D4, start=1):
            tab.press(str(number))
            tab.wait(IS_DONE)
            name = "document.querySelector('button[aria-pressed=true]').dataset.element"
            assert tab.evaluate(name) == element.name
            turned = model.act(element, latent)
            torch.testing.assert_close(read(tab, "found.acted"), turned, atol=1e-3, rtol=0)
            decoded = model.decode(turned, noise=element.act_on_image(noise))
            found = read(tab, "found.decoded")
            torch.testing.assert_close(found, decoded, atol=1e-3, rtol=0)
            error = (decoded.clamp(-1, 1) - element.act_on_image(image)).square().mean()
            psnr = tab.evaluate("efaePage.models[0].found.psnr")
            assert psnr == pytest.approx(float(10 * torch.log10(4 / error)), abs=1e-2)
            assert f"PSNR {psnr:.2f} dB" in tab.evaluate("document.body.innerText")
            assert tab.evaluate("efaePage.models[0].found.largest") < 0.5
            if element != D4.identity:
                assert tab.evaluate("efaePage.models[1].found.largest") > 0.5
    tab.evaluate(
        "const s = document.getElementById('steps'); s.value = '8';"
        " s.dispatchEvent(new Event('change'))"
    )
    tab.wait(IS_DONE)
    turned = model.act(D4["anti_transpose"], latent)
    noise = D4["anti_transpose"].act_on_image(noise)
    expected = model.decode(turned, steps=8, noise=noise)
    torch.testing.assert_close(read(tab, "found.decoded"), expected, atol=1e-3, rtol=0)
    assert "A credit. The drawings are from OpenMoji" in tab.evaluate("document.body.innerText")
    assert tab.faults == []


def test_a_first_picture_takes_three_seconds(tab, address):
    """Of CPU time, from the start of the page's process, with a second model beside the first."""
    open_page(tab, address)
    assert tab.evaluate("efaePage.models[0].image.shape") == [3, 32, 32]
    assert tab.count_cpu_seconds() < 3


def test_a_large_photograph_takes_fifteen_seconds(tab, large, tmp_path):
    Image.open(PHOTOGRAPH).resize((256, 256)).save(tmp_path / "large.png")
    with serve(large) as address:
        open_page(tab, address)
        tab.choose_file("#file", tmp_path / "large.png")
        tab.wait(f"{STATUS} === 'large.png: 256 {TIMES} 256 pixels.'")
    assert tab.evaluate("efaePage.models[0].image.shape") == [3, 256, 256]
    assert tab.evaluate("efaePage.models[0].found.largest") < 0.5
    assert read(tab, "found.decoded").std() > 1e-2
    assert tab.count_cpu_seconds() < 15
    # Chromium's own words, where the page asks for a GPU and there is none.
    assert [fault for fault in tab.faults if "No available adapters" not in fault] == []


def open_with_gpu(tab: Tab, address: str, script: str = "") -> None:
    """Open a page in a browser whose WebGPU, a software's, passes for a GPU's."""
    accept = "Object.defineProperty(GPUAdapterInfo.prototype, 'isFallbackAdapter', {value: false});"
    tab.call("Page.addScriptToEvaluateOnNewDocument", source=accept + script)
    open_page(tab, address)


@pytest.fixture
def gpu_tab(tmp_path) -> Iterator[Tab]:
    tab = Tab(tmp_path / "profile", has_gpu=True)
    yield tab
    tab.close()


@pytest.mark.slow
def test_webgpu_gives_the_numbers_of_pytorch_and_a_lost_one_is_left(gpu_tab, large):
    model = efae.load(large.parent / "model")
    with serve(large) as address:
        open_with_gpu(gpu_tab, address)
        assert gpu_tab.evaluate("efaePage.provider") == "webgpu"
        for provider in ("webgpu", "wasm"):
            image, noise = read(gpu_tab, "image"), read(gpu_tab, "noise")
            latent = read(gpu_tab, "latent")
            torch.testing.assert_close(latent, model.encode(image), atol=1e-3, rtol=0)
            decoded = model.decode(latent, noise=noise)
            torch.testing.assert_close(read(gpu_tab, "found.decoded"), decoded, atol=1e-3, rtol=0)
            assert gpu_tab.evaluate("efaePage.provider") == provider
            run = gpu_tab.evaluate("efaePage.run")
            # What ONNX Runtime does when the device is lost.
            gpu_tab.evaluate(
                "efaePage.models[0].velocity.run = () => Promise.reject(new Error('lost'));"
                " document.querySelector('#samples button:last-child').click()"
            )
            gpu_tab.wait(f"efaePage.run > {run} && (efaePage.done > {run} || {IS_FAULT})")
        assert gpu_tab.evaluate(STATUS) == "The model failed: lost"  # without a GPU to leave
    assert gpu_tab.faults == []


@pytest.mark.slow
def test_a_gpu_that_gives_no_device_is_not_used(gpu_tab, large):
    refuse = "GPUAdapter.prototype.requestDevice = () => Promise.reject(new Error('none'));"
    with serve(large) as address:
        open_with_gpu(gpu_tab, address, refuse)
    assert gpu_tab.evaluate("efaePage.provider") == "wasm"


def test_the_page_fits_wide_and_narrow_windows(tab, address, tmp_path):
    for width, height in ((1280, 900), (360, 740)):
        tab.resize(width, height)
        open_page(tab, address)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        tab.take_picture(tmp_path / f"{width}.png")
        shown = np.asarray(Image.open(tmp_path / f"{width}.png").convert("RGB"))
        assert len(np.unique(shown.reshape(-1, 3), axis=0)) > 100  # pictures, not a blank page
    assert tab.evaluate("[...document.querySelectorAll('img')].every((image) => image.alt)")
    labelled = "[...document.querySelectorAll('canvas')].every((c) => c.ariaLabel)"
    assert tab.evaluate(labelled)
    assert tab.faults == []


def test_other_files_and_huge_photographs_get_a_sentence(tab, address, tmp_path):
    open_page(tab, address)
    (tmp_path / "notes.txt").write_text("no picture")
    tab.choose_file("#file", tmp_path / "notes.txt")
    tab.wait(
        f"{STATUS} === 'notes.txt is no picture that this browser can read: use a PNG, JPEG"
        " or WebP file.'"
    )
    Image.new("RGB", (10000, 10000), (200, 30, 30)).save(tmp_path / "huge.png")
    tab.choose_file("#file", tmp_path / "huge.png")
    size = f"10000 {TIMES} 10000 pixels, scaled and cropped to 32 {TIMES} 32"
    tab.wait(f"{STATUS} === 'huge.png: {size} for the model.'")
    Image.new("RGB", (4, 4)).save(tmp_path / "tiny.png")
    tab.choose_file("#file", tmp_path / "tiny.png")
    tab.wait(
        f"{STATUS} === 'tiny.png has 4 {TIMES} 4 pixels: use a picture of 8 or more on each side.'"
    )
    assert tab.faults == []


def test_what_cannot_run_says_so(tab, address, folder):
    tab.open((folder / "index.html").as_uri())
    tab.wait(f"{IS_FAULT} && {STATUS}.includes('python -m http.server')")
    whole = (folder / "models/0/encode.onnx").read_bytes()
    (folder / "models/0/encode.onnx").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    tab.open(address)
    tab.wait(f"{IS_FAULT} && {STATUS}.startsWith('models/0/encode.onnx is damaged: build or copy')")
    (folder / "models/0/encode.onnx").unlink()
    tab.open(address)
    tab.wait(f"{IS_FAULT} && {STATUS}.startsWith('models/0/encode.onnx is missing from')")
    (folder / "models/0/encode.onnx").write_bytes(whole)
    script = "WebAssembly.validate = () => false"
    tab.call("Page.addScriptToEvaluateOnNewDocument", source=script)
    tab.open(address)
    tab.wait(f"{IS_FAULT} && {STATUS}.startsWith('This browser has no WebAssembly with SIMD')")
