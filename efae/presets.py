"""Presets: complete, named experiments, each with its images, machine and duration."""

from dataclasses import replace

from efae.config import (
    Config,
    DataConfig,
    FlowConfig,
    GeneratorConfig,
    LatentsConfig,
    LossConfig,
    ModelConfig,
    NetworkConfig,
    OptimizerConfig,
    RayConfig,
    RepresentationConfig,
    StartConfig,
    TrackingConfig,
    TrainingConfig,
)

QUICKSTART = Config(
    model=ModelConfig(
        hidden_size=192,
        depth=4,
        num_heads=4,
        patch_size=8,
        encoder_hidden_size=128,
        encoder_depth=2,
    ),
    # Sampling starts from pure noise, where the image comes from the latent alone, so training near
    # noise helps (25.2, 25.9, 25.5 dB at mean 0, 1, 2 after 600 steps).
    flow=FlowConfig(time_mean=1.0),
    training=TrainingConfig(
        steps=3000, global_batch_size=64, precision="fp32", evaluation_interval=500
    ),
)

# Short, on one worker, and half as wide, so that a sweep can try many. Whether full runs rank
# representations in the same order has not been measured.
QUICKSTART_TRIAL = replace(
    QUICKSTART,
    model=replace(QUICKSTART.model, hidden_size=96, encoder_hidden_size=64),
    optimizer=OptimizerConfig(learning_rate=1.2e-2, warmup_steps=50, ema_decay=0.99),
    training=replace(
        QUICKSTART.training,
        steps=600,
        log_interval=50,
        evaluation_interval=150,
        checkpoint_interval=150,
        validation_images=256,
    ),
    ray=RayConfig(num_workers=1, checkpoints_to_keep=1),
)

FASHION_MNIST = Config(
    data=DataConfig(
        uri="s3://efae-data/fashion-mnist-32/train",
        held_out_uri="s3://efae-data/fashion-mnist-32/held_out",
        channels=1,
    ),
    representation=RepresentationConfig(dim=16),
    model=QUICKSTART.model,
    flow=QUICKSTART.flow,
    training=TrainingConfig(steps=3000, global_batch_size=64, precision="fp32"),
)

# After 300 CPU-seconds 1.6 dB ahead of the quick start's model (benchmarks/README.md, ablate).
PHOTOGRAPHS_64 = Config(
    data=DataConfig(
        uri="s3://efae-data/photographs/64/train",
        held_out_uri="s3://efae-data/photographs/64/held_out",
        resolution=64,
    ),
    model=ModelConfig(
        kind="unet",
        start="closed_form",
        bottleneck="running",
        hidden_size=192,
        depth=3,
        fine_hidden_size=64,
        patch_size=4,
        encoder_hidden_size=192,
        encoder_depth=2,
    ),
    flow=FlowConfig(time_mean=1.0, sampler_steps=1),
    optimizer=OptimizerConfig(learning_rate=4e-3, ema_decay=0.99),
    training=TrainingConfig(
        steps=3000, global_batch_size=16, precision="fp32", evaluation_interval=500
    ),
)

IMAGENET_256 = Config(
    data=DataConfig(
        uri="s3://efae-data/imagenet-256/train",
        held_out_uri="s3://efae-data/imagenet-256/held_out",
        resolution=256,
        cache_bytes=200 * 2**30,
        decode_threads=8,
    ),
    representation=RepresentationConfig(dim=32),
    model=ModelConfig(
        hidden_size=1024,
        depth=16,
        num_heads=16,
        patch_size=8,
        encoder_hidden_size=1024,
        encoder_depth=8,
    ),
    flow=FlowConfig(time_mean=1.0),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2000, ema_decay=0.9999),
    training=TrainingConfig(
        steps=200_000,
        global_batch_size=512,
        precision="bf16",
        log_interval=100,
        evaluation_interval=5000,
        checkpoint_interval=1000,
        held_out_images=2048,
    ),
    ray=RayConfig(num_workers=8, use_gpu=True, cpus_per_worker=10, max_failures=20),
)

# An autoencoder of diffusers that people already have: short, and at a small learning rate.
FINE_TUNE = Config(
    data=IMAGENET_256.data,
    model=ModelConfig(kind="diffusers", level="regularized", bottleneck="posterior"),
    start=StartConfig(action="fitted"),
    loss=LossConfig(reconstruction="l1", kl_weight=1e-6),
    optimizer=OptimizerConfig(learning_rate=1e-4, ema_decay=0.999),
    training=TrainingConfig(
        steps=10_000,
        global_batch_size=16,
        precision="bf16",
        activation_memory=0.0,
        evaluation_interval=1000,
        validation_images=128,
        held_out_images=512,
    ),
    ray=RayConfig(num_workers=1, use_gpu=True, cpus_per_worker=8, max_failures=20),
    # Not "efae", whose champion has another latent and other weights.
    tracking=TrackingConfig(registered_model="efae-vae"),
)


def _photographs(
    downsampling: int, dim: int, model: ModelConfig, workers: int, batch: int, micro_batch: int
) -> Config:
    """Return the experiment on photographs at 256 px, for `workers` GPUs."""
    return replace(
        IMAGENET_256,
        representation=RepresentationConfig(dim=dim),
        model=replace(model, downsampling=downsampling),
        flow=replace(IMAGENET_256.flow, sampler_steps=1),
        training=replace(
            IMAGENET_256.training, global_batch_size=batch, micro_batch_size=micro_batch
        ),
        ray=replace(IMAGENET_256.ray, num_workers=workers),
    )


def _convolutional(width: int, depth: int, attention_depth: int, num_heads: int) -> ModelConfig:
    return ModelConfig(
        kind="unet",
        start="closed_form",
        bottleneck="running",
        hidden_size=width,
        depth=depth,
        fine_hidden_size=width // 4,
        attention_depth=attention_depth,
        num_heads=num_heads,
        patch_size=4,
        encoder_hidden_size=width,
        encoder_depth=4,
    )


# At 64 px, convolutions won over the transformer at equal compute (benchmarks/README.md, ablate).
# That attention pays on these larger grids is an assumption.
_SIZES = {
    "s": (_convolutional(768, 8, 2, 12), "one GPU of 24 GB", 1, 128, 64),
    "b": (_convolutional(1280, 12, 4, 20), "one H100", 1, 256, 128),
    "l": (_convolutional(2048, 16, 4, 16), "eight H100", 8, 512, 0),
}
_LATENTS = {"f16": (16, 32), "f8": (8, 16)}
_PHOTOGRAPHS = {
    f"photos_{latent}_{size}": (
        f"Photographs at 256 px, {dim} x {256 // f} x {256 // f} latents, size {size.upper()}, on"
        f" {machine}; not run by us yet (docs/sizing.md has memory and speed, as calculated)."
        " Shards as for imagenet_256.",
        _photographs(f, dim, model, workers, batch, micro_batch),
    )
    for latent, (f, dim) in _LATENTS.items()
    for size, (model, machine, workers, batch, micro_batch) in _SIZES.items()
}

# Description (images, machine, duration, shards) and whole configuration, by name.
PRESETS: dict[str, tuple[str, Config]] = {
    "quickstart": (
        "OpenMoji drawings at 32 px, two CPU workers, about seven minutes; needs `make up` and the"
        " shards, both done by `make train`.",
        QUICKSTART,
    ),
    "quickstart_trial": (
        "One trial of `make tune`: quickstart on one CPU worker, half as wide and a fifth as"
        " long, about a minute.",
        QUICKSTART_TRIAL,
    ),
    "fashion_mnist": (
        "Fashion-MNIST padded to 32 px, two CPU workers, about five minutes. Shards:"
        " build_shards --source idx:PATH --resolution 32 --held-out 512.",
        FASHION_MNIST,
    ),
    "photographs_64": (
        "Crops of photographs at 64 px, two CPU workers, about five minutes; a network for images"
        " of any size. Shards: python -m benchmarks.photographs --output s3://efae-data/photographs.",
        PHOTOGRAPHS_64,
    ),
    "imagenet_256": (
        "Photographs at 256 px on eight GPUs. Sizes follow DiT-L (Peebles & Xie 2023); not run by"
        " us yet, so no score is promised. Shards: build_shards --source folder:PATH"
        " --resolution 256 --encoding jpeg --held-out 5000, with --labels folders for generators"
        " of classes; or index_shards for tars.",
        IMAGENET_256,
    ),
    **_PHOTOGRAPHS,
    "fine_tune": (
        "Makes an autoencoder of diffusers equivariant, on photographs at 256 px and one GPU; needs"
        " --start.model diffusers:PATH. Not run at this size by us yet. Shards as for"
        " imagenet_256.",
        FINE_TUNE,
    ),
}


def _generator(
    latents: str, network: NetworkConfig, optimizer: OptimizerConfig, training: TrainingConfig
) -> GeneratorConfig:
    return GeneratorConfig(
        data=LatentsConfig(uri=f"s3://efae-data/{latents}"),
        generator=network,
        optimizer=optimizer,
        training=training,
    )


_GENERATE_QUICKSTART = _generator(
    "openmoji-32-latents",
    NetworkConfig(hidden_size=192, depth=6, num_heads=4),
    OptimizerConfig(learning_rate=2e-3, beta2=0.95, ema_decay=0.998),
    TrainingConfig(
        steps=1000,
        global_batch_size=64,
        precision="fp32",
        evaluation_interval=250,
        checkpoint_interval=100,
    ),
)

# Learning rate, beta2 and EMA of LightningDiT (Yao et al. 2025, arXiv:2501.01423).
_GENERATE_B = replace(
    _generator(
        "imagenet-256-latents",
        NetworkConfig(hidden_size=768, depth=12, num_heads=12, patch_size=2),
        OptimizerConfig(learning_rate=2e-4, warmup_steps=1000, beta2=0.95, ema_decay=0.9999),
        TrainingConfig(
            steps=400_000,
            global_batch_size=256,
            precision="bf16",
            log_interval=100,
            evaluation_interval=10_000,
            checkpoint_interval=2000,
            evaluation_precision="bf16",
        ),
    ),
    ray=RayConfig(num_workers=1, use_gpu=True, cpus_per_worker=8, max_failures=20),
)

_GENERATE_XL = replace(
    _GENERATE_B,
    generator=NetworkConfig(hidden_size=1152, depth=28, num_heads=16),
    training=replace(_GENERATE_B.training, global_batch_size=1024, steps=80_000),
    ray=replace(_GENERATE_B.ray, num_workers=8),
)

GENERATORS: dict[str, tuple[str, GeneratorConfig]] = {
    "generate_quickstart": (
        "OpenMoji drawings at 32 px, two CPU workers, about three minutes. Latents: jobs/encode.py"
        " on the shards of `make train`.",
        _GENERATE_QUICKSTART,
    ),
    "generate_b": (
        "B/2 of SiT (Ma et al. 2024) on one GPU, for latents of 32 x 32 cells; not run by us yet."
        " Latents: jobs/encode.py on the shards of imagenet_256; their labels by --data.classes"
        " 1000.",
        _GENERATE_B,
    ),
    "generate_xl": (
        "XL/1 of LightningDiT (Yao et al. 2025) on eight GPUs, for latents of 16 x 16 cells; not"
        " run by us yet. Latents: jobs/encode.py on the shards of imagenet_256; their labels by"
        " --data.classes 1000.",
        _GENERATE_XL,
    ),
}
"""Generators: description and whole configuration, by name."""
