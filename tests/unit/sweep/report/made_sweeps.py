"""Sweeps with a planted optimum, as the mappings that reports are made of."""

from typing import Any

import numpy as np

from efae.symmetry.representation import Representation

ROTATION, SPLIT = "representation.rotation_dims", "representation.chirality_split"
MULTIPLICITIES, RATE = "representation.multiplicities", "optimizer.learning_rate"
DIM, COLOURS, STEPS, RUNGS = 32, 3, 400, [100, 200]
CHOICES = {ROTATION: [0, 4, 8, 12, 16, 20, 24, 28], SPLIT: [0, 0.25, 0.5, 0.75]}
CAUSE = "loss is nan at step 150 <script>alert(1)</script> in s3://me:hunter2@bucket/shard-3.tar"
PLANTED = (14, 0.45)


def psnr_at(rotation_dims: Any, split: Any) -> Any:
    return 24 - 0.012 * (rotation_dims - PLANTED[0]) ** 2 - 5 * (split - PLANTED[1]) ** 2


def make_trial(number: int, rotation_dims: int, split: float, **more: Any) -> dict[str, Any]:
    """One trial of a smooth world with noise of 0.05 dB; `more` overrides what it has."""
    seed = more.get("seed", 0)
    split_config = {ROTATION: rotation_dims, SPLIT: split}
    representation = Representation.from_split(
        dim=DIM, rotation_dims=rotation_dims, chirality_split=split
    )
    generator = np.random.default_rng((number, seed))
    rate = float(more.pop("rate", 1e-3))
    end = psnr_at(rotation_dims, split) - 2 * abs(np.log10(rate / 1e-3)) + generator.normal(0, 0.05)
    reached = {"finished": STEPS, "stopped": RUNGS[number % 2], "failed": 150, "running": 250}
    steps = reached[more.get("state", "finished")]
    validations = [
        {
            "step": step,
            "psnr": float(value),
            "held_out_loss": float(10 ** (-value / 10)),
            "worst_gap_db": 0.0,
        }
        for step in range(50, steps + 1, 50)
        for value in [end - 6 * np.exp(-step / 110) + generator.normal(0, 0.03)]
    ]
    last = validations[-1]
    config = split_config | {RATE: rate, "training.seed": seed}
    return {
        "key": f"t{number:03d}",
        "number": number,
        "phase": "search",
        "config": config,
        "seed": seed,
        "state": "finished",
        "metrics": {
            "psnr": last["psnr"],
            "held_out_loss": last["held_out_loss"],
            "worst_gap_db": 0.0,
            "latent_size": 512,
        },
        "multiplicities": representation.multiplicities,
        "validations": validations,
        "mlflow_run_id": f"{number:032x}",
        "seconds": 40.0 + 0.1 * steps + float(generator.normal(0, 1)),
        "steps": steps,
        "cause": "",
    } | more


def make_sweep(trials: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "sweep_name": "splits-20260801",
        "mlflow_parent_run_id": "5f" * 16,
        "mlflow_url": "http://127.0.0.1:5000/#/experiments/1",
        "experiment": "efae-sweeps",
        "level": "exact",
        "dim": DIM,
        "colours": COLOURS,
        "downsampling": 8,
        "train_data": "s3://data/openmoji/train (3981 images, id 9a41)",
        "held_out_data": "s3://data/openmoji/held-out (256 images, id 11c0)",
        "credits": ["OpenMoji, CC BY-SA 4.0"],
        "objectives": [{"metric": "psnr", "mode": "max"}],
        "space": {name: {"choices": values} for name, values in CHOICES.items()},
        "search": "optuna",
        "seed": 0,
        "steps": STEPS,
        "rungs": RUNGS,
        "reduction_factor": 2,
        "trials": trials,
        "infeasible": 3,
        "best": None,
        "pareto": [],
        "theory": {"rotation_dims": 16, "chirality_split": 0.69},
        "closed_form_split": {
            "multiplicities": {"a1": 5, "a2": 1, "b1": 6, "b2": 4, "e": 8},
            "linear_psnr": 22.41,
        },
        "cost": {
            "trial_seconds": sum(trial["seconds"] for trial in trials),
            "wall_seconds": 0.6 * sum(trial["seconds"] for trial in trials),
            "steps": sum(trial["steps"] for trial in trials),
            "full_steps": STEPS * len(trials),
        },
    } | more


def make_full_sweep() -> dict[str, Any]:
    """Twenty-odd trials in every state, and three seeds of two finalists."""
    generator = np.random.default_rng(7)
    trials: list[dict[str, Any]] = []
    while len(trials) < 20:
        rotation = int(generator.choice(CHOICES[ROTATION]))
        split = float(generator.choice(CHOICES[SPLIT]))
        a1 = DIM - rotation - round((DIM - rotation) * split)
        known = {(trial["config"][ROTATION], trial["config"][SPLIT]) for trial in trials}
        if a1 < COLOURS or (rotation, split) in known:
            continue
        poor = psnr_at(rotation, split) < 22.6 and len(trials) % 3
        state = "stopped" if poor else "finished"
        state = {4: "failed", 9: "running"}.get(len(trials), state)
        trials.append(make_trial(len(trials), rotation, split, state=state))
    trials[4] |= {"metrics": {"psnr": float("nan")}, "cause": CAUSE}
    for split in (0.5, 0.75):
        for seed in (1, 2):
            trials.append(make_trial(len(trials), 16, split, seed=seed, phase="finalist"))
    same = {ROTATION: 16, SPLIT: 0.5}.items()
    return make_sweep(trials, best=make_best([t for t in trials if same <= t["config"].items()]))


def make_best(trials: list[dict[str, Any]]) -> dict[str, Any]:
    values = [trial["metrics"]["psnr"] for trial in trials]
    return {
        "key": trials[0]["key"],
        "config": trials[0]["config"],
        "metric": "psnr",
        "value": float(np.mean(values)),
        "spread": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "seeds": [trial["seed"] for trial in trials],
        "values": values,
        "model_uri": "models:/efae/3",
    }
