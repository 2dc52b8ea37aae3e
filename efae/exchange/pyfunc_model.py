"""Encodes images, acts on latents and decodes them with MLflow, numpy and torch alone.

    model = mlflow.pyfunc.load_model("models:/efae@champion")
    latent = model.predict(images, params={"task": "encode"})
    turned = model.predict(latent, params={"task": "act", "element": "rot90"})
    images = model.predict(turned, params={"task": "decode", "seed": 0})

All arrays are float32, (batch, channel, height, width); images lie in [-1, 1]. This script travels
with a model as MLflow's "model from code", beside two programs of torch.export and programs.json,
which says what they take; the package that made them does not have to be installed.
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
    """The two programs, and the action of the group between them."""

    def load_context(self, context: Any) -> None:
        """Loads what lies beside this script, once its sha256 is that of programs.json.

        Raises:
            ValueError: a program is damaged.
        """
        self.facts = json.loads(Path(context.artifacts["programs.json"]).read_text())
        self.encoder = self._load_program(context, "encode.pt2")
        self.decoder = self._load_program(context, "decode.pt2")

    # np.ndarray: of most other types MLflow warns whoever loads this.
    def predict(
        self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> Any:
        """What `params["task"]` makes of the array: a latent, or images.

        Args:
            context: of MLflow.
            model_input: images for "encode", latents for "act" and "decode".
            params: "task"; "element" of the group for "act"; for "decode" the "seed" that its noise
                is drawn from.

        Raises:
            ValueError: no such task or element, or an array of another kind or shape.
        """
        given: dict[str, Any] = {"task": "encode", "element": "identity", "seed": 0}
        given |= params or {}
        task = given["task"]
        if task == "encode":
            images = self._check(model_input, "image_shape", task)
            with torch.no_grad():
                return self.encoder(torch.from_numpy(images)).numpy()
        if task == "act":
            return self._act(given["element"], self._check(model_input, "latent_shape", task))
        if task == "decode":
            return self._decode(self._check(model_input, "latent_shape", task), given["seed"])
        raise ValueError(f"task={task!r}: use one of {', '.join(TASKS)}")

    def _act(self, name: str, latents: np.ndarray) -> np.ndarray:
        """The grid moves like an image, and the channels by a signed permutation."""
        elements = self.facts["elements"]
        if name not in elements:
            raise ValueError(f"element={name!r}: this model's group has {', '.join(elements)}")
        element = elements[name]
        moved = np.flip(latents, -1) if element["mirrored"] else latents
        moved = np.rot90(moved, element["quarter_turns"], (-2, -1))
        sign = np.array(element["sign"], np.float32)[:, None, None]
        return moved[:, element["source"]] * sign

    def _decode(self, latents: np.ndarray, seed: int) -> np.ndarray:
        """From noise of the seed to images; equal seeds give equal noise."""
        noise = torch.randn(
            (len(latents), *self.facts["image_shape"]),
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

    def _check(self, array: Any, shape_name: str, task: str) -> np.ndarray:
        """The array in a layout that torch takes."""
        expected = ", ".join(map(str, self.facts[shape_name]))
        kind = getattr(array, "dtype", type(array).__name__)
        if kind != np.float32:
            raise ValueError(
                f"{task} takes a float32 array (batch, {expected}), not {kind}: use"
                " np.asarray(x, np.float32)"
            )
        if array.ndim != 4 or list(array.shape[1:]) != self.facts[shape_name] or not len(array):
            raise ValueError(
                f"array of shape {array.shape}: {task} takes (batch, {expected}), one example or"
                " more"
            )
        return np.array(array, order="C")


mlflow.models.set_model(PortableModel())
