"""diffusers takes our autoencoder for one of its own: its pipelines run, save and load it."""

import copy
import json
from itertools import pairwise

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
)
from diffusers.image_processor import VaeImageProcessor

import efae
from efae.config import Config
from efae.config.forms import with_overrides
from efae.exchange.diffusers_adapter import AutoencoderEFAE
from efae.model.autoencoder import Autoencoder
from efae.model.octic.layers import Recomputing
from efae.model.pretrained import CLASS_NAME
from efae.model.stored_files import CONFIG, MANIFEST, MODEL_FILES
from efae.symmetry import D4

SIZES = {
    "data.resolution": 16,
    "model.hidden_size": 16,
    "model.encoder_hidden_size": 16,
    "model.num_heads": 2,
    "model.depth": 1,
    "representation.dim": 16,
    "flow.sampler_steps": 2,
}


def build(**overrides) -> AutoencoderEFAE:
    torch.manual_seed(0)
    model = Autoencoder(with_overrides(Config(), SIZES | overrides)).eval()
    with torch.no_grad():
        for weight in model.parameters():  # a new decoder's output is zero
            weight.add_(0.1 * torch.randn_like(weight))
        model.bottleneck.power.uniform_(0.5, 2)  # as training leaves it, not 1
    return AutoencoderEFAE(model.requires_grad_(False))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def vae() -> AutoencoderEFAE:
    return build()


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=seeded()) * 2 - 1


@pytest.fixture(scope="module")
def pipeline(vae) -> DiTPipeline:
    torch.manual_seed(1)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        sample_size=2,
        patch_size=1,
        norm_num_groups=4,
    )
    pipeline = DiTPipeline(transformer=transformer.eval(), vae=vae, scheduler=DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: DiTPipeline, **options) -> torch.Tensor:
    options = {"num_inference_steps": 2, "output_type": "pt", "generator": seeded()} | options
    return pipeline([3, 7], **options).images


def test_it_says_what_pipelines_ask(vae):
    settings = vae.config
    assert (settings.in_channels, settings.out_channels, settings.latent_channels) == (3, 3, 16)
    assert (settings.scaling_factor, settings.shift_factor, settings.sample_size) == (1, 0, 16)
    assert settings.force_upcast is False  # of SDXL, where images are given
    assert 2 ** (len(settings.block_out_channels) - 1) == 8
    assert settings.group == vae.group.name
    assert settings.representation == vae.representation.multiplicities
    assert (vae.dtype, vae.device) == (torch.float32, torch.device("cpu"))
    assert AutoencoderEFAE.__name__ == CLASS_NAME


@pytest.mark.parametrize(("patch", "downsampling"), [(4, 4), (4, 8), (8, 8), (2, 16)])
def test_the_scale_factor_is_the_pixels_of_a_latent_cell(patch, downsampling):
    vae = build(**{"model.patch_size": patch, "model.downsampling": downsampling})
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    assert factor == downsampling
    latent = vae.encode(torch.zeros(1, 3, 16, 16)).latent_dist.mode()
    assert latent.shape == (1, 16, 16 // factor, 16 // factor)


def test_pixels_that_are_no_power_of_two_are_refused():
    sizes = {"data.resolution": 12, "model.patch_size": 3, "model.downsampling": 6}
    with pytest.raises(ValueError, match=r"model\.downsampling=6.*power of two"):
        build(**sizes)


def test_layers_that_are_offloaded_one_by_one_are_refused_by_name(vae, image):
    """What enable_sequential_cpu_offload leaves of each module, until that is called itself."""
    offloaded, latent = copy.deepcopy(vae), vae.encode(image).latent_dist.mode()
    offloaded.autoencoder.decoder.to("meta")
    for call in (lambda: offloaded.encode(image), lambda: offloaded.decode(latent)):
        with pytest.raises(
            ValueError, match=r"AutoencoderEFAE: .*enable_sequential.*: use enable_m"
        ):
            call()


def test_a_point_is_its_own_sample(vae, image):
    posterior = vae.encode(image).latent_dist
    assert torch.equal(posterior.mode(), vae.autoencoder.encode(image))
    assert torch.equal(posterior.mean, posterior.mode())
    assert torch.equal(posterior.sample(seeded()), posterior.mode())
    assert vae.encode(image, return_dict=False)[0].mode().equal(posterior.mode())


def test_a_gaussian_has_the_learned_spread_where_latents_are_handed_out(image):
    """Samples are what training feeds the decoder: a disturbed latent, handed out."""
    vae = build(**{"model.bottleneck": "kl"})
    bottleneck = vae.autoencoder.bottleneck
    with torch.no_grad():
        bottleneck.log_variance.uniform_(-4, 0)
    posterior = vae.encode(image).latent_dist
    bounded = vae.autoencoder.bounded(image)
    for seed in range(3):
        trained = bottleneck.normalize(
            bottleneck.add_noise(bounded, torch.randn(bounded.shape, generator=seeded(seed)))
        )
        torch.testing.assert_close(posterior.sample(seeded(seed)), trained)
    assert not torch.equal(posterior.sample(seeded()), posterior.mode())


def test_samples_of_the_gaussian_turn_with_the_image(image):
    """One spread for both channels of a plane, and none for a sign: the law of samples turns."""
    vae = build(**{"model.bottleneck": "kl"})
    with torch.no_grad():
        vae.autoencoder.bottleneck.log_variance.uniform_(-4, 0)
    for g in D4:
        spread = vae.encode(g.act_on_image(image)).latent_dist.std
        turned = vae.act(g, vae.encode(image).latent_dist.std).abs()
        torch.testing.assert_close(spread, turned)


def test_decoding_is_ours_from_the_same_noise(vae, image):
    z = vae.encode(image).latent_dist.mode()
    noise = torch.randn(3, 3, 16, 16, generator=seeded(5))
    assert torch.equal(
        vae.decode(z, generator=seeded(5)).sample, vae.autoencoder.decode(z, noise=noise)
    )
    assert torch.equal(vae.decode(z[:1]).sample, vae.autoencoder.decode(z[:1], seed=0))


def test_without_a_generator_it_is_a_function_of_each_latent(vae, image):
    z = vae.encode(image).latent_dist.mode()
    whole = vae.decode(z).sample
    assert torch.equal(whole, vae.decode(z, return_dict=False)[0])
    for i in range(len(z)):
        torch.testing.assert_close(vae.decode(z[i : i + 1]).sample, whole[i : i + 1])
    vae.decoding_seed = 1
    other = vae.decode(z).sample
    vae.decoding_seed = 0
    assert not torch.allclose(other, whole)


def test_one_generator_per_image(vae, image):
    z = vae.encode(image).latent_dist.mode()
    together = vae.decode(z, generator=[seeded(i) for i in range(3)]).sample
    for i in range(3):
        alone = vae.decode(z[i : i + 1], generator=seeded(i)).sample
        torch.testing.assert_close(together[i : i + 1], alone)


def test_steps_are_those_of_the_configuration_or_as_set(vae, image):
    z = vae.encode(image).latent_dist.mode()
    default = vae.decode(z[:1]).sample
    samples = []
    for steps in (1, 2, 3):
        vae.decoding_steps = steps
        samples.append(vae.decode(z[:1]).sample)
    vae.decoding_steps = None
    assert torch.equal(samples[1], default)
    assert not any(torch.allclose(a, b) for a, b in pairwise(samples))


def test_latents_turn(vae, image):
    z = vae.encode(image).latent_dist.mode()
    for g in D4:
        turned = vae.encode(g.act_on_image(image)).latent_dist.mode()
        torch.testing.assert_close(vae.act(g, z), turned, atol=1e-5, rtol=1e-5)


def test_forward_encodes_and_decodes(vae, image):
    expected = vae.decode(vae.encode(image).latent_dist.mode()).sample
    assert torch.equal(vae(image).sample, expected)
    assert torch.equal(vae(image, sample_posterior=True, return_dict=False)[0], expected)


def test_images_of_any_size(vae):
    """A rectangle turns; what a latent cell does not divide comes back at its own size."""
    wide = torch.rand(1, 3, 8, 24, generator=seeded()) * 2 - 1
    z = vae.encode(wide).latent_dist.mode()
    assert z.shape == (1, 16, 1, 3)
    turned = vae.encode(D4["rot90"].act_on_image(wide)).latent_dist.mode()
    torch.testing.assert_close(vae.act(D4["rot90"], z), turned, atol=1e-5, rtol=1e-5)
    cut = build()
    with pytest.warns(UserWarning, match=r"10 x 16 pixels are padded to 16 x 16"):
        assert cut(wide[:, :, :, :16].repeat(1, 1, 2, 1)[:, :, :10]).sample.shape == (1, 3, 10, 16)
    with pytest.raises(ValueError, match=r"size=\(8, 16\): a latent of 1 x 3 cells"):
        vae.decode(z, size=(8, 16))


@pytest.mark.parametrize("kind", ["transformer", "unet"])
def test_diffusers_finds_the_blocks_to_compile(kind):
    vae = build(**{"model.kind": kind, "model.attention_depth": 1})
    vae.compile_repeated_blocks(backend="eager")
    for module in vae.modules():
        is_compiled = getattr(module, "_compiled_call_impl", None) is not None
        assert is_compiled == isinstance(module, Recomputing)


@pytest.mark.slow
def test_blocks_that_diffusers_compiles_take_batches_of_every_size():
    vae = build(**{"model.kind": "unet", "model.attention_depth": 1})
    images = [torch.rand(count, 3, 16, 16) * 2 - 1 for count in (1, 3, 4)]
    expected = [vae(image, generator=seeded()).sample for image in images]
    torch._dynamo.reset()
    vae.compile_repeated_blocks(backend="eager", fullgraph=True)  # more programs than torch's 8
    for image, sample in zip(images, expected, strict=True):
        torch.testing.assert_close(vae(image, generator=seeded()).sample, sample)


def test_slices_change_nothing_but_memory(vae, image):
    z, whole = vae.encode(image).latent_dist.mode(), vae(image, generator=seeded()).sample
    vae.enable_slicing()
    torch.testing.assert_close(vae.encode(image).latent_dist.mode(), z)
    torch.testing.assert_close(vae(image, generator=seeded()).sample, whole)
    vae.disable_slicing()


def test_tiles_of_a_convolutional_model_change_nothing_but_memory():
    vae, image, sizes = build(**{"model.kind": "unet"}), torch.randn(1, 3, 96, 64), list[int]()
    z, whole = vae.encode(image).latent_dist.mode(), vae(image, generator=seeded()).sample
    for network in (vae.autoencoder.encoder, vae.autoencoder.decoder):
        network.register_forward_pre_hook(lambda _, inputs: sizes.extend(inputs[0].shape[-2:]))
    vae.enable_tiling()
    assert vae(image, generator=seeded()).sample.equal(whole)  # within one tile of 512 pixels
    vae.tile_sample_min_size = 56
    sizes.clear()
    torch.testing.assert_close(vae.encode(image).latent_dist.mode(), z)
    sample = vae(image, generator=seeded()).sample
    torch.testing.assert_close(sample, whole, atol=1e-4, rtol=1e-4)
    assert max(sizes) <= 56
    vae.disable_tiling()
    assert vae(image, generator=seeded()).sample.equal(whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(vae, image, dtype, tmp_path):
    half = build().to(dtype=dtype)
    z = half.encode(image.to(dtype)).latent_dist.mode()
    sample = half.decode(z).sample
    assert z.dtype == sample.dtype == half.dtype == dtype
    exact = vae.encode(image).latent_dist.mode()
    assert (z.float() - exact).abs().max() < 0.1
    assert (sample.float() - vae.decode(exact).sample).abs().max() < 0.2
    larger = torch.rand(1, 3, 24, 32, generator=seeded()) * 2 - 1
    assert (half(larger.to(dtype)).sample.float() - vae(larger).sample).abs().max() < 0.5
    half.save_pretrained(tmp_path)
    assert AutoencoderEFAE.from_pretrained(tmp_path).dtype == dtype
    model = efae.load(tmp_path)  # computes in float32
    assert (model.encode(image) - exact).abs().max() < 0.1
    assert model.decode(exact, seed=0).dtype == torch.float32
    for g in D4:  # rho(g) is a signed permutation: nothing is rounded
        assert torch.equal(vae.act(g.inverse, half.act(g, z)), z)


def test_a_pipeline_generates_what_its_latents_decode_to(pipeline, vae, monkeypatch):
    seen = []
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda z: seen.append(z) or decode(z))
    images = generate(pipeline)
    assert images.shape == (2, 3, 16, 16)
    (latents,) = seen  # neither scaled nor shifted on their way
    assert latents.shape == (2, 16, 2, 2)
    torch.testing.assert_close(images, (decode(latents).sample / 2 + 0.5).clamp(0, 1))
    assert not torch.allclose(images[0], images[1])


def test_a_pipeline_can_be_repeated_and_sliced(pipeline):
    images = generate(pipeline)
    assert torch.equal(generate(pipeline), images)
    pipeline.vae.enable_slicing()
    torch.testing.assert_close(generate(pipeline), images)
    pipeline.vae.disable_slicing()
    (pixels, _) = generate(pipeline, output_type="np")
    torch.testing.assert_close(torch.tensor(pixels).permute(2, 0, 1), images[0])


def test_a_pipeline_saves_and_loads_it(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["vae"] == ["efae.exchange.diffusers_adapter", CLASS_NAME]
    assert {path.name for path in (tmp_path / "vae").iterdir()} == {*MODEL_FILES, MANIFEST}
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.vae) is AutoencoderEFAE
    assert torch.equal(generate(loaded), generate(pipeline))


def test_a_pipeline_loads_it_in_half_precision(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.vae.dtype == torch.bfloat16
    assert generate(loaded).dtype == torch.bfloat16


def test_a_pipeline_does_not_open_a_planted_pickle(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin.*pickle"):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_one_format_and_two_readers(vae, tmp_path):
    vae.save_pretrained(tmp_path / "theirs", card="# card")
    vae.autoencoder.save_pretrained(tmp_path / "ours")
    ours = Autoencoder.from_pretrained(tmp_path / "theirs")
    theirs = AutoencoderEFAE.from_pretrained(tmp_path, subfolder="ours")
    assert not theirs.training
    assert ours.config == theirs.autoencoder.config == vae.autoencoder.config
    for name, tensor in vae.autoencoder.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)
        assert torch.equal(theirs.autoencoder.state_dict()[name], tensor)
    stored = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert all(stored[name] == value for name, value in theirs.config.items() if name != "efae")
    assert (tmp_path / "theirs" / "README.md").read_text() == "# card"


def test_a_second_one_is_built_from_its_configuration(vae):
    again = AutoencoderEFAE.from_config(vae.config)
    assert again.config == vae.config
    assert again.autoencoder.config == vae.autoencoder.config


def test_options_that_there_are_not_are_refused(vae, tmp_path):
    for option in ({"variant": "fp16"}, {"safe_serialization": False}, {"push_to_hub": True}):
        with pytest.raises(ValueError, match=next(iter(option))):
            vae.save_pretrained(tmp_path / "none", **option)
    assert not (tmp_path / "none").exists()
    vae.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    vae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"variant: no such option"):
        AutoencoderEFAE.from_pretrained(tmp_path, variant="fp16")
    for place in ("cpu", torch.device("cpu"), {"": "cpu"}, {}, None):
        placed = AutoencoderEFAE.from_pretrained(tmp_path, device_map=place, variant=None)
        assert placed.device == torch.device("cpu")
    places = ["auto", "balanced", {"": "disk"}]
    for place in places if torch.cuda.is_available() else [*places, 0, {"": 0}]:
        with pytest.raises(ValueError, match=r"device_map=.*: names no device here; give one"):
            AutoencoderEFAE.from_pretrained(tmp_path, device_map=place)
    assert AutoencoderEFAE.from_pretrained(tmp_path, torch_dtype="auto").dtype == vae.dtype
    for option in ({"torch_dtype": "float16"}, {"dtype": torch.int8}):
        with pytest.raises(ValueError, match=r"dtype=.*: give a floating-point dtype"):
            AutoencoderEFAE.from_pretrained(tmp_path, **option)


def train_step(vae, images: torch.Tensor) -> float:
    """Latent diffusion as scripts for AutoencoderKL do it; knows nothing of ours."""
    torch.manual_seed(0)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    processor = VaeImageProcessor(vae_scale_factor=factor)
    channels = vae.config.latent_channels
    network = UNet2DModel(
        sample_size=vae.config.sample_size // factor,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        layers_per_block=1,
    )
    scheduler = DDPMScheduler()
    pixels = processor.preprocess(images).to(vae.device, vae.dtype)
    latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
    noise, t = torch.randn_like(latents), torch.tensor([10, 500, 900])
    noisy = scheduler.add_noise(latents, noise, t)
    loss = torch.nn.functional.mse_loss(network(noisy, t).sample, noise)
    loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    decoded = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
    shown = processor.postprocess(decoded.detach(), output_type="pil")
    assert [picture.size for picture in shown] == [(16, 16)] * 3
    return float(loss.detach())


def test_a_training_script_for_autoencoder_kl_runs_unchanged(vae):
    images = torch.rand(3, 3, 16, 16, generator=seeded())
    theirs = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )
    assert 0 < train_step(theirs, images) < 10
    assert 0 < train_step(vae, images) < 10
