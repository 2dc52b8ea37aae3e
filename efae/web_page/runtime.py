"""ONNX Runtime for browsers: the files of onnxruntime-web, one version, checked by its hash."""

import base64
import hashlib
import io
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from efae.registry.cache import find_cache

VERSION = "1.30.0"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
ARCHIVE = f"onnxruntime-web-{VERSION}.tgz"
FILES = ("ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
GPU_FILES = (
    "ort.webgpu.min.js",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
"""What a browser with WebGPU loads instead."""


def fetch_runtime() -> bytes:
    """Return the archive of the runtime; npm downloads it once, into the cache of models.

    Raises:
        ValueError: npm is missing or fails, or the archive is not the one that we know.
    """
    archive = find_cache().parent / ARCHIVE
    if not archive.exists():
        _download(archive)
    data = archive.read_bytes()
    if base64.b64encode(hashlib.sha512(data).digest()).decode() != SHA512:
        raise ValueError(
            f"{archive} is damaged: its sha512 is not {SHA512}; remove it and try again"
        )
    return data


def copy_runtime(destination: Path, with_gpu: bool = False) -> None:
    """Write `FILES` into a folder.

    Args:
        destination: Folder, created if missing.
        with_gpu: Whether to write `GPU_FILES`, too.

    Raises:
        ValueError: As in `fetch_runtime`.
    """
    data = fetch_runtime()
    destination.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(data)) as files:
        for name in (*FILES, *(GPU_FILES if with_gpu else ())):
            member = files.extractfile(f"package/dist/{name}")
            assert member is not None
            (destination / name).write_bytes(member.read())


def _download(archive: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(
            f"the page needs onnxruntime-web {VERSION}, which npm downloads: install npm, or copy"
            f" {ARCHIVE} to {archive.parent}"
        )
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        command = [npm, "pack", "--silent", f"onnxruntime-web@{VERSION}"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if result.returncode:
            reason = (result.stderr.strip() or result.stdout.strip()).split("\n")[0]
            raise ValueError(f"npm could not download onnxruntime-web {VERSION}: {reason}")
        (Path(folder) / ARCHIVE).replace(archive)
