"""Fine-tuning on real servers: a lost worker, the folder it makes, and one copy of latents."""

import signal
import subprocess
import sys

import diffusers
import pytest
import torch

import efae
from data_pipelines import ShardDataset
from tests.conftest import find_workers
from tests.integration.train_jobs import OPTIONS, SHARDS, find_run, find_version, run_job, submitted

pytestmark = [pytest.mark.s3, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def options(tmp_path_factory, whole_run) -> list[str]:
    """Of the job: a small AutoencoderKL with random weights, on the shards of `whole_run`."""
    folder = tmp_path_factory.mktemp("pretrained") / "vae"
    torch.manual_seed(0)
    channels = whole_run.data.params["data.channels"]
    diffusers.AutoencoderKL(
        in_channels=int(channels),
        out_channels=int(channels),
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
    ).save_pretrained(folder)
    return [
        "--model.kind=diffusers",
        "--model.level=regularized",
        "--model.bottleneck=posterior",
        f"--start.model=diffusers:{folder}",
        "--start.action=fitted",
        "--representation.rotation-dims=2",
        "--start.anchor-weight=0.1",
        "--training.steps=120",
    ]


STOCK_PIPELINE = """
import sys
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

vae = AutoencoderKL.from_pretrained(sys.argv[1], low_cpu_mem_usage=False)
channels, side = vae.config.latent_channels, 8
transformer = DiTTransformer2DModel(
    num_attention_heads=2, attention_head_dim=8, in_channels=channels, out_channels=2 * channels,
    num_layers=1, sample_size=side,
)
pipeline = DiTPipeline(transformer, vae, DDIMScheduler())
pipeline.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
images = pipeline([1], generator=generator, num_inference_steps=2, output_type="np").images
cell = 2 ** (len(vae.config.block_out_channels) - 1)
assert images.shape == (1, cell * side, cell * side, vae.config.out_channels), images.shape
assert not [name for name in sys.modules if name.split(".")[0] == "efae"]
"""
"""A pipeline of diffusers with an autoencoder from a folder, in a process without this package."""


def test_a_lost_worker_changes_nothing_and_the_folder_is_of_its_class(
    options, local_stack, tmp_path, monkeypatch
):
    monkeypatch.setenv("EFAE_CACHE_DIR", str(tmp_path / "cache"))
    with submitted("tuned", *options, f"--output={tmp_path / 'vae'}", inside=False) as job:
        assert "fitting the action" in job.wait()
    with submitted("tuned-killed", *options, inside=False) as job:
        job.wait_for_checkpoint(40)
        find_workers("RayTrainWorker", local_stack)[0].send_signal(signal.SIGKILL)
        job.wait()
    versions = [find_version(find_run(name)) for name in ("tuned", "tuned-killed")]
    assert versions[0].tags["digest"] == versions[1].tags["digest"]

    group = ("--representation.group=C4", "--tracking.run-name=tuned")
    refused = run_job("train", *OPTIONS, *options, *group)
    assert refused.returncode == 1
    assert "representation.group: 'D4' -> 'C4'" in refused.stdout + refused.stderr
    assert "fitting the action" not in refused.stdout  # which would replace the basis of the run

    subprocess.run([sys.executable, "-c", STOCK_PIPELINE, str(tmp_path / "vae")], check=True)
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae", low_cpu_mem_usage=False)
    model = efae.load(tmp_path / "vae")
    config = model.config
    image = torch.rand(2, config.data.channels, *config.data.image_size) * 2 - 1
    with torch.no_grad():
        latent = model.encode(image)
        plain = vae.encode(image).latent_dist.mode()
        ours = model.from_irreps(model.denormalize(latent))
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.decode(latent), vae.decode(plain).sample)

    output = "s3://efae-data/tuned-latents"
    result = run_job(
        "encode",
        f"--model={tmp_path / 'vae'}",
        f"--data={SHARDS}/held_out",
        f"--output={output}",
        "--certificate-images=8",
        "--symmetrize",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    latents = ShardDataset.open(output)
    assert latents.certificate["symmetrized"]
    batch = next(iter(latents.loader(global_batch_size=8, augment="group")))
    assert len(set(batch.element)) > 1
