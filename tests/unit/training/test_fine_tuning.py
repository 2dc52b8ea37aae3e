"""Fine-tuning of autoencoders of diffusers: the start, the loss, the result, and bad input."""

import copy
import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import efae
from data_pipelines import ShardDataset
from efae.checkpoints.checkpoint import read_checkpoint, read_model, write_checkpoint
from efae.config import Config
from efae.config.forms import with_overrides
from efae.exchange.diffusers_tokenizer import load_diffusers, read_pretrained
from efae.model.autoencoder import Autoencoder
from efae.model.fine_tuning import FineTuning
from efae.model.networks.diffusers_vae import CLASSES
from efae.model.objective import draw
from efae.model.pretrained import as_model_folder, read_folder
from efae.symmetry import D4, GROUPS
from efae.tracking.server import Server
from efae.training.loop import Start, train
from efae.training.process import Process
from efae.training.starts.source import (
    adopt_pretrained,
    copy_source,
    load_source,
)
from tests.unit.training.test_training import Keeper, assert_same_state, shards

__all__ = ["shards"]
ALONE = Process(torch.device("cpu"))
NOWHERE = Server("http://localhost:1")
WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY = {
    "data.resolution": 16,
    "data.decode_threads": 1,
    "model.kind": "diffusers",
    "model.bottleneck": "posterior",
    "model.level": "regularized",
    "start.action": "split",
    "training.steps": 6,
    "training.global_batch_size": 8,
    "training.precision": "fp32",
    "training.log_interval": 2,
    "training.checkpoint_interval": 3,
    "optimizer.learning_rate": 1e-3,
}
NORMALIZED = "AutoencoderDC with batch normalisation"
IMAGE = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "AutoencoderKL":
        return diffusers.AutoencoderKL(
            block_out_channels=(8, 8, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=4,
            scaling_factor=0.5,
        )
    if name == "AutoencoderTiny":
        return diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
        )
    norms = ("batch_norm" if name == NORMALIZED else "rms_norm", "rms_norm", "rms_norm")
    network = diffusers.AutoencoderDC(
        latent_channels=8,
        decoder_norm_types=norms,
        encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
    )
    for statistics in network.buffers():
        if statistics.is_floating_point():
            statistics.uniform_(0.5, 2)
    return network


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    for name in (*CLASSES, NORMALIZED):
        build(name).save_pretrained(folder / name)
    return folder


def change(folder: Path, copy: Path, **settings) -> Path:
    """A copy of a folder with other settings in its config.json."""
    shutil.copytree(folder, copy)
    found = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(found | settings))
    return copy


def configure(folder: Path, **overrides) -> Config:
    settings = TINY | {"start.model": f"diffusers:{folder}"} | overrides
    settings = {"ray.storage_uri": f"{folder.parent}/runs"} | settings
    settings |= {"tracking.run_name": "mine", "ray.num_workers": 1}
    return adopt_pretrained(with_overrides(Config(), settings))


def restore(config: Config) -> Autoencoder:
    return Autoencoder.restore(read_pretrained(config))


@pytest.mark.parametrize("name", CLASSES)
def test_the_start_is_the_pretrained_autoencoder(folders, name, tmp_path):
    network = getattr(diffusers, name).from_pretrained(folders / name, low_cpu_mem_usage=False)
    model = restore(configure(folders / name))
    with torch.no_grad():
        encoded = network.encode(IMAGE)
        latent = encoded.latent_dist.mode() if name == "AutoencoderKL" else encoded[0]
        scaled = latent * network.config.scaling_factor
        torch.testing.assert_close(model.encode(IMAGE), scaled)
        torch.testing.assert_close(model.decode(scaled), network.decode(latent).sample)


@pytest.mark.parametrize("name", CLASSES)
def test_a_saved_model_is_a_plain_folder_of_its_class_with_a_new_scale(folders, name, tmp_path):
    config = configure(folders / name)
    if name == "AutoencoderKL":
        factors = {"latents_mean": [1.0] * 4, "latents_std": [2.0] * 4, "shift_factor": 1.0}
        config = configure(change(folders / name, tmp_path / "before", **factors))
    model = restore(config)
    model.bottleneck.power.fill_(4.0)
    with torch.no_grad():
        next(model.decoder.parameters()).add_(1)
    model.save_pretrained(tmp_path)
    network = getattr(diffusers, name).from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert network.config.scaling_factor == 0.5
    stale = (network.config.get(key) for key in ("latents_mean", "latents_std", "shift_factor"))
    assert not any(stale)  # SDXL's pipeline would apply them
    ours = efae.load(tmp_path)
    with torch.no_grad():
        latent = ours.encode(IMAGE)
        torch.testing.assert_close(ours.decode(latent), network.decode(latent / 0.5).sample)
        torch.testing.assert_close(ours.encode(IMAGE), model.encode(IMAGE), rtol=0, atol=0)
    rest = {"model": {}, "optimizer": {}, "metadata": {"step": 1}, "config": model.config}
    write_checkpoint(tmp_path / "step", ema=model.state_dict(), **rest)
    exported = as_model_folder(read_model(str(tmp_path / "step")))
    assert exported.files == read_folder(tmp_path).files


@pytest.mark.parametrize("group", ["D4", "C4", "flips", "mirror"])
@pytest.mark.parametrize("name", CLASSES)
def test_an_average_over_the_group_is_exactly_equivariant(folders, name, group):
    overrides = {"representation.group": group, "start.symmetrize": True}
    overrides |= {"start.action": "spatial"} if group == "C4" else {}
    config = configure(folders / name, **overrides)
    model = Autoencoder(config)
    model.load_state_dict(restore(config).state_dict())
    with torch.no_grad():
        image = IMAGE[..., :8] if group in ("flips", "mirror") else IMAGE
        latent = model.encode(image)
        sample = model.decode(latent)
        for g in GROUPS[group]:
            torch.testing.assert_close(
                model.encode(g.act_on_image(image)), model.act(g, latent), atol=2e-6, rtol=0
            )
            turned = model.decode(model.act(g, latent))
            torch.testing.assert_close(turned, g.act_on_image(sample), atol=2e-6, rtol=0)
        if model.representation.multiplicities["a1"] == model.representation.dim:
            original = load_diffusers(str(folders / name), GROUPS[group])
            original.symmetrize = True
            torch.testing.assert_close(original.encode(image), latent)
            torch.testing.assert_close(original.decode(latent), sample)


def test_an_average_leaves_out_a_decoder_that_is_exact_already(folders):
    small = {"model.hidden_size": 32, "model.encoder_hidden_size": 32, "model.fine_hidden_size": 8}
    flow = {"model.kind": "unet", "model.level": "exact", "start.train": "decoder"}
    config = configure(
        folders / "AutoencoderKL",
        **flow,
        **small,
        **{"start.symmetrize": True, "start.action": "spatial"},
    )
    model = Autoencoder(config).eval()
    calls: list[int] = []
    model.decoder.register_forward_hook(lambda *_: calls.append(1))
    latent = model.encode(IMAGE)
    noise = torch.randn(IMAGE.shape, generator=torch.Generator().manual_seed(0))
    sample = model.decode(latent, 1, noise=noise)
    assert len(calls) == 1
    for g in D4:
        turned = model.decode(model.act(g, latent), 1, noise=g.act_on_image(noise))
        torch.testing.assert_close(turned, g.act_on_image(sample), atol=2e-6, rtol=0)


def measure(config: Config, original: Autoencoder | None = None, **changes) -> torch.Tensor:
    model = Autoencoder(config)
    model.load_state_dict(restore(config).state_dict())
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(0.01)
    draws = draw(config, tuple(IMAGE.shape), torch.Generator().manual_seed(0))
    return FineTuning(model.train(), original=original)(IMAGE, draws)[0]


def test_the_loss_is_that_of_its_terms(folders):
    off = {"loss.kl_weight": 0.0, "loss.pair_weight": 0.0}
    config = configure(folders / "AutoencoderKL", **off)
    plain = measure(config)

    def extra(**settings):
        return measure(configure(folders / "AutoencoderKL", **off | settings)) - plain

    network = diffusers.AutoencoderKL.from_pretrained(
        folders / "AutoencoderKL", low_cpu_mem_usage=False
    )
    with torch.no_grad():
        nats = network.encode(IMAGE).latent_dist.kl()
    expected = 0.1 * nats / IMAGE[0].numel()
    torch.testing.assert_close(extra(**{"loss.kl_weight": 0.1}), expected, atol=1e-5, rtol=1e-3)

    model = restore(config)
    draws = draw(config, tuple(IMAGE.shape), torch.Generator().manual_seed(0))
    with torch.no_grad():
        elements = [list(model.group)[i] for i in draws.element.tolist()]
        turned = torch.stack([g.act_on_image(x) for g, x in zip(elements, IMAGE, strict=True)])
        difference = model.encode(turned) - model.act(elements, model.encode(IMAGE))
    pair = difference.square().mean((1, 2, 3))
    torch.testing.assert_close(extra(**{"loss.pair_weight": 1.0}), pair, atol=1e-5, rtol=1e-3)
    assert (extra(**{"loss.reconstruction": "l1"}).abs() > 1e-3).all()

    moved = restore(config)
    with torch.no_grad():
        moved.encoder.quant_conv.bias[:4] += 1.0
    anchored = configure(folders / "AutoencoderKL", **off | {"start.anchor_weight": 2.0})
    drift = measure(anchored, moved) - plain  # 1 over the power 1 / 0.5^2
    torch.testing.assert_close(drift, torch.full((3,), 2.0 * 0.25), atol=1e-5, rtol=0)
    torch.testing.assert_close(measure(anchored, restore(config)), plain)


def test_a_frozen_encoder_encodes_once_per_step(folders):
    """The pair term would have no gradient."""
    frozen = {"start.train": "decoder"}
    losses = [
        measure(configure(folders / "AutoencoderKL", **frozen, **{"model.level": level}))
        for level in ("regularized", "objective")
    ]
    torch.testing.assert_close(*losses, rtol=0, atol=0)


def test_only_the_encoder_of_an_anchor_takes_memory_of_the_device(folders, tmp_path):
    where = {"ray.storage_uri": str(tmp_path / "runs"), "start.anchor_weight": 0.1}
    config = configure(folders / "AutoencoderKL", **where)
    copy_source(config, NOWHERE)
    source = load_source(config, Process(torch.device("meta")))
    assert {p.device.type for p in source.encoder.parameters()} == {"meta"}
    assert {p.device.type for p in source.decoder.parameters()} == {"cpu"}


def test_combinations_without_sense_are_refused(folders):
    unet = {"model.kind": "unet", "model.level": "exact"}
    for match, overrides in (
        ("start.train=encoder with model.kind=unet", {**unet, "start.train": "encoder"}),
        ("a frozen encoder does not", {"start.train": "decoder", "start.anchor_weight": 0.1}),
        ("use bf16", {"training.precision": "fp16"}),
    ):
        with pytest.raises(ValueError, match=match):
            configure(folders / "AutoencoderKL", **overrides)
    configure(folders / "AutoencoderTiny", **{"training.precision": "fp16"})
    shrunk = {"loss.scaling_probability": 0.5, "representation.group": "flips"}
    configure(folders / "AutoencoderKL", **shrunk, **{"data.resolution": (40, 56)})  # 10 x 14 cells
    with pytest.raises(ValueError, match=r"start\.train=decoder with"):
        with_overrides(Config(), {"start.train": "decoder"})


@pytest.mark.parametrize("name", [*CLASSES, NORMALIZED])
def test_recomputed_activations_give_the_same_bits_for_less_memory(folders, name):
    def step(share: float) -> tuple[int, list[torch.Tensor]]:
        config = configure(folders / name, **{"training.activation_memory": share})
        model = copy.deepcopy(restore(config))
        model.requires_grad_(True).train()
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        draws = draw(config, tuple(IMAGE.shape), torch.Generator().manual_seed(0))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = FineTuning(model)(IMAGE, draws)[0]
        loss.sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return sum(kept.values()), [loss, *model.buffers(), *gradients]

    most, wanted = step(1.0)
    least, got = step(0.0)
    assert least < 0.9 * most, (least, most)
    assert len(got) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize(
    "overrides",
    [
        {"start.anchor_weight": 0.1, "loss.scaling_probability": 0.5},
        {"start.train": "decoder", "model.level": "objective"},
        {"start.symmetrize": True, "model.level": "exact", "representation.group": "mirror"},
        {
            "model.kind": "unet",
            "model.level": "exact",
            "model.hidden_size": 32,
            "model.fine_hidden_size": 8,
            "model.encoder_hidden_size": 32,
            "start.train": "decoder",
            "flow.sampler_steps": 1,
        },
    ],
    ids=["anchored", "decoder alone", "symmetrized", "flow decoder"],
)
def test_a_resumed_run_is_the_uninterrupted_one(folders, shards, tmp_path, overrides):
    where = {"ray.storage_uri": str(tmp_path / "runs")}
    config = configure(folders / "AutoencoderKL", **where, **overrides)
    dataset = ShardDataset.open(shards)
    copy_source(config, NOWHERE)
    source = load_source(config, ALONE)
    keeper = Keeper(config, tmp_path / "whole")
    whole = train(config, dataset, ALONE, Start(source=source), keeper)
    assert whole.step == 6
    halfway = read_checkpoint(tmp_path / "whole" / "step-00000003")
    anchored = config.start.anchor_weight > 0
    again = train(config, dataset, ALONE, Start(halfway, source=source if anchored else None))
    assert_same_state(again, whole)
    frozen = config.start.train == "decoder"
    trained = whole.model.encoder.state_dict()
    same = [torch.equal(trained[name], w) for name, w in source.encoder.state_dict().items()]
    assert all(same) if frozen else not any(same)
    if config.model.kind == "unet":  # whatever the encoder is, the decoder is equivariant
        latent = torch.randn(2, 4, 4, 4)
        noise = torch.randn(2, 3, 16, 16)
        model = whole.model.eval()
        for g in model.group:
            turned = model.decode(model.act(g, latent), noise=g.act_on_image(noise))
            expected = g.act_on_image(model.decode(latent, noise=noise))
            torch.testing.assert_close(turned, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("trained", ["both", "encoder"])
def test_batch_normalisation_keeps_its_statistics(folders, shards, tmp_path, trained):
    where = {"ray.storage_uri": str(tmp_path / "runs"), "start.train": trained}
    config = configure(folders / NORMALIZED, **where)
    copy_source(config, NOWHERE)
    source = load_source(config, ALONE)
    dataset = ShardDataset.open(shards)
    keeper = Keeper(config, tmp_path / "whole")
    whole = train(config, dataset, ALONE, Start(source=source), keeper)
    assert_same_state(
        train(config, dataset, ALONE, Start(read_checkpoint(tmp_path / "whole/step-00000003"))),
        whole,
    )
    model = Autoencoder.restore(read_model(str(tmp_path / "whole/step-00000006")))
    statistics = dict(source.named_buffers())
    assert statistics
    for name, kept in model.named_buffers():
        assert torch.equal(kept, statistics[name])
    draws = draw(config, tuple(IMAGE.shape), torch.Generator().manual_seed(0))
    objective = FineTuning(whole.model.eval())
    whole.model.decoder.train()
    with torch.no_grad():
        examples = zip(IMAGE.split(1), draws.split(1), strict=True)
        parts = [objective(image, part)[0] for image, part in examples]
        torch.testing.assert_close(torch.cat(parts), objective(IMAGE, draws)[0])


@pytest.mark.parametrize("name", CLASSES)
def test_images_and_latents_of_any_floating_dtype_are_taken(folders, name):
    model = restore(configure(folders / name))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        image = IMAGE.to(dtype)
        latent = model.encode(image)
        torch.testing.assert_close(latent, model.encode(image.float()))
        assert model.decode(latent.to(dtype)).dtype == torch.float32


def test_a_flow_decoder_learns_rectangles_over_all_eight_elements(folders):
    config = configure(
        folders / "AutoencoderKL",
        **{"model.kind": "unet", "model.level": "exact", "data.resolution": (16, 24)},
        **{"start.train": "decoder", "start.action": "spatial"},
    )
    assert restore(config).group == D4


def test_bad_folders_are_refused_with_the_reason(folders, tmp_path):
    def refuse(match: str, change, **overrides):
        folder = tmp_path / match.replace("/", "-")[:20]
        build("AutoencoderKL").save_pretrained(folder)
        change(folder)
        with pytest.raises(ValueError, match=match):
            read_pretrained(configure(folder, **overrides))

    def describe(**changes):
        def change(folder):
            settings = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(settings | changes))

        return change

    def spoil(folder):
        weights = load_file(folder / WEIGHTS)
        weights["encoder.conv_in.bias"][0] = float("nan")
        save_file(weights, folder / WEIGHTS)

    def pickle(folder):
        (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")

    def nothing(folder):
        return None

    refuse("describes the class UNet2DModel", describe(_class_name="UNet2DModel"))
    refuse(
        "is not a configuration of diffusers",
        lambda folder: (folder / "config.json").write_text("{"),
    )
    refuse("found: diffusion_pytorch_model.bin", pickle)
    refuse("NaN or infinity in encoder.conv_in.bias", spoil)
    refuse("cannot be loaded", describe(latent_channels=8))
    refuse(
        "must be a multiple of 4",
        nothing,
        **{"data.resolution": 18, "model.downsampling": 2, "model.patch_size": 2},
    )
    refuse("need finite numbers", describe(latents_mean=[0.0], latents_std=[1.0] * 4))
    refuse("need finite numbers", describe(scaling_factor=-1.0))
    refuse("from 3 to 1 colours", describe(out_channels=1))
    refuse("its latents have 4", nothing, **{"representation.multiplicities": (3, 0, 0, 0, 1)})
    refuse("its images have 3 colours", nothing, **{"data.channels": 1})
    with pytest.raises(ValueError, match="no such folder; models are not downloaded"):
        configure(Path("stabilityai/sdxl-vae"))
    (tmp_path / "pipeline").mkdir()
    build("AutoencoderKL").save_pretrained(tmp_path / "pipeline" / "vae")
    with pytest.raises(ValueError, match=r"did you mean diffusers:.*/pipeline/vae"):
        configure(tmp_path / "pipeline")
    with pytest.raises(ValueError, match="name an autoencoder"):
        adopt_pretrained(with_overrides(Config(), TINY))
