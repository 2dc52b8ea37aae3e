"""Distillation of a flow into one step (SSDD, Vallaeys et al. 2025, arXiv:2510.04961).

From latent z and noise e, a trained teacher samples the image T(z, e) in several steps; its student
learns to predict that image from the same noise in one, D(e, t = 1, z). The student has the
teacher's encoder and bottleneck, bit for bit, so that latents, their scale and the certificates of
latent sets hold for both. A unet's student may train at another size than its teacher did.

At level `exact` the student is equivariant by construction: its layers commute with the group. So
does what it learns. The teacher's velocity obeys v(gx, t, rho(g) z) = g v(x, t, z), and its sampler
adds such velocities to the noise, so that T(rho(g) z, ge) = g T(z, e). Since g only moves pixels,
|D(ge, 1, rho(g) z) - T(rho(g) z, ge)|^2 = |D(e, 1, z) - T(z, e)|^2: all views of an image have one
loss, and none has to be drawn. At the other levels views are drawn, as without a teacher.
"""

from torch import Tensor

from efae.config import Config
from efae.config import forms as configuration
from efae.model.autoencoder import Autoencoder
from efae.model.execution.compilation import compile_blocks
from efae.model.objective import Teacher
from efae.model.pretrained import StoredModel
from efae.tracking.server import Server
from efae.training.process import Process

_SHARED = ("representation.", "model.", "data.channels", "flow.prediction")
_OF_DECODER = ("model.hidden_size", "model.depth", "model.attention_depth", "model.modulation")
_FREE = (*_OF_DECODER, "model.latent_noise")


def check_student(config: Config, teacher: Config) -> None:
    """Check that the teacher's encoder is the student's.

    Args:
        config: Configuration of the student.
        teacher: Configuration of the teacher.

    Raises:
        ValueError: It is not; the message lists all settings that differ.
    """
    shared = _SHARED
    if config.model.kind == "transformer":
        shared += ("data.resolution",)  # its positions are those of one size
    if config.start.is_diffusers or teacher.start.is_diffusers:
        shared += ("start.",)
    different = [
        line
        for key, line in configuration.list_changes(teacher, config)
        if key.startswith(shared) and key not in _FREE
    ]
    if different:
        raise ValueError(
            f"flow.distill_from={config.flow.distill_from!r}: that model has another encoder,"
            f" latent or prediction than the student would ({'; '.join(different)}); use its"
            f" settings, except {', '.join(_FREE)}, which are the student's own"
        )


def read_teacher(config: Config, server: Server) -> StoredModel:
    """Read the model that flow.distill_from names.

    Args:
        config: Configuration of the student.
        server: MLflow server, for a teacher in its registry.

    Raises:
        ValueError: There is no such model, or its encoder is not the student's.
        CheckpointError: The model is damaged.
        ConnectionError: MLflow fails.
        StorageError: The storage refuses or does not answer.
    """
    from efae.registry import pull  # MLflow takes two seconds

    stored = pull.read(config.flow.distill_from, server)
    check_student(config, stored.config)
    return stored


def make_sampler(teacher: Autoencoder, config: Config, process: Process) -> Teacher:
    """Return the function that samples images from a teacher, compiled as its student is."""
    if config.choose_compilation(process.device.type) == "blocks":
        compile_blocks(teacher)

    def sample(latent: Tensor, noise: Tensor) -> Tensor:
        return teacher.decode(latent, config.flow.distill_steps, noise)

    return sample
