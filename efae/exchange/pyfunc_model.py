"""Encode images, act on latents and decode them, with MLflow, numpy and torch alone.

    model = mlflow.pyfunc.load_model("models:/efae@champion")
    latent = model.predict(images, params={"task": "encode"})
    turned = model.predict(latent, params={"task": "act", "element": "rot90"})
    images = model.predict(turned, params={"task": "decode", "seed": 0})

All arrays are float32, (batch, channel, height, width); images lie in [-1, 1]. This script travels
with a model as MLflow's "model from code", beside two programs of torch.export and programs.json,
which describes their inputs; the package that made them need not be installed.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import mlflow.models
import numpy as np
import torch
from mlflow.pyfunc.model import PythonModel

TASKS = ("encode", "act", "decode")


class PortableModel(PythonModel):
    """The encoder and decoder programs, and the action of the group on latents."""

    def load_context(self, context: Any) -> None:
        """Load the programs beside this script, after checking their sha256 against programs.json.

        Raises:
            ValueError: A program is damaged.
        """
        self.facts = json.loads(Path(context.artifacts["programs.json"]).read_text())
        self.encoder = self._load_program(context, "encode.pt2")
        self.decoder = self._load_program(context, "decode.pt2")

    # Typed np.ndarray: for most other types MLflow logs a warning on every load.
    def predict(
        self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> Any:
        """Run `params["task"]` on the array: return latents or images.

        Args:
            context: Context from MLflow; not used.
            model_input: Images for "encode", latents for "act" and "decode".
            params: Parameters: "task"; for "act" the "element" of the group; for "decode" the
                "seed" of the noise.

        Raises:
            ValueError: The task or element is unknown, or the array has another dtype or shape.
        """
        given: dict[str, Any] = {"task": "encode", "element": "identity", "seed": 0}
        given |= params or {}
        task = given["task"]
        if task == "encode":
            images = self._check(model_input, "image", task)
            with torch.no_grad():
                return self.encoder(torch.from_numpy(images)).numpy()
        if task == "act":
            return self._act(given["element"], self._check(model_input, "latent", task))
        if task == "decode":
            return self._decode(self._check(model_input, "latent", task), given["seed"])
        raise ValueError(f"task={task!r}: use one of {', '.join(TASKS)}")

    def _act(self, name: str, latents: np.ndarray) -> np.ndarray:
        """Move the grid like an image, and permute and sign the channels."""
        elements = self.facts["elements"]
        if name not in elements:
            raise ValueError(f"element={name!r}: this model's group has {', '.join(elements)}")
        element = elements[name]
        moved = np.flip(latents, -1) if element["mirrored"] else latents
        moved = np.rot90(moved, element["quarter_turns"], (-2, -1))
        sign = np.array(element["sign"], np.float32)[:, None, None]
        return moved[:, element["source"]] * sign

    def _decode(self, latents: np.ndarray, seed: int) -> np.ndarray:
        """Decode latents to images, from the noise of the seed."""
        height, width = (side * self._count_pixels() for side in latents.shape[2:])
        noise = torch.randn(
            (len(latents), self.facts["image_shape"][0], height, width),
            generator=torch.Generator().manual_seed(int(seed)),
        )
        with torch.no_grad():
            return self.decoder(torch.from_numpy(latents), noise).numpy()

    def _load_program(self, context: Any, name: str) -> torch.nn.Module:
        path = Path(context.artifacts[name])
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != self.facts["sha256"][name]:
            raise ValueError(
                f"{path} is damaged: its sha256 is {digest}, and programs.json says"
                f" {self.facts['sha256'][name]}; download the model again"
            )
        return torch.export.load(path).module()

    def _count_pixels(self) -> int:
        """Return the pixels of a latent cell, per side."""
        return self.facts["image_shape"][1] // self.facts["latent_shape"][1]

    def _check(self, array: Any, kind: str, task: str) -> np.ndarray:
        """Check dtype and shape of images or latents; return the array in a layout for torch."""
        channels, *sides = self.facts[f"{kind}_shape"]
        least, unit = self.facts["least_cells"], self._count_pixels() if kind == "image" else 1
        expected = f"(batch, {channels}, {', '.join(map(str, sides))})"
        if least is not None:
            expected = f"(batch, {channels}, height, width)"
        found = getattr(array, "dtype", type(array).__name__)
        if found != np.float32:
            raise ValueError(
                f"{task} takes a float32 array {expected}, not {found}: use"
                " np.asarray(x, np.float32)"
            )
        given = list(array.shape[2:])
        fits = given == sides
        if least is not None:
            expected += f" with sides in multiples of {unit}, at least {least * unit}"
            fits = all(side >= least * unit and side % unit == 0 for side in given)
        if array.ndim != 4 or array.shape[1] != channels or not fits or not len(array):
            raise ValueError(
                f"array of shape {array.shape}: {task} takes {expected}, one example or more"
            )
        return np.array(array, order="C")


mlflow.models.set_model(PortableModel())
