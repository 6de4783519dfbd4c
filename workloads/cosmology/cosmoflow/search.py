"""Architecture search under a FLOP budget: python -m workloads.cosmology.cosmoflow.search FOLDER --gflop 2

SAIH grew its models by architecture search, so that larger ones stay good ones. Here every candidate costs the same:
optuna (its tree-structured Parzen estimator) chooses family, depth, stages and learning rate, and the width is the
largest that the budget allows. Each is trained for a few steps on generated universes and judged by the mean absolute
error on universes of another seed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saih.core import Params, Value
from saih.errors import SaihError
from workloads.cosmology.cosmoflow import execution, spec
from workloads.cosmology.cosmoflow.data import VALIDATION_SEED, Standard
from workloads.cosmology.cosmoflow.model import build
from workloads.cosmology.cosmoflow.networks import HEAD_CHANNELS, deepest
from workloads.cosmology.dataset import Dataset, generate
from workloads.cosmology.recipe import Recipe

WIDEST = 4096
DEEPEST = {"cosmoflow": 4, "vit": 12}
LEARNING_RATES = (1e-4, 1e-2)
BATCH = 8


@dataclass(frozen=True)
class Candidate:
    """An architecture, what it costs and what it came to."""

    params: Mapping[str, Value]
    """family, width, depth, stages."""
    forward_flop: float
    """Per sample."""
    mae: float
    """Validation error, mean over the four parameters, each scaled to [-1, 1]."""

    def __str__(self) -> str:
        words = ",".join(f"{name}={value}" for name, value in self.params.items())
        return f"MAE {self.mae:.4f}, {self.forward_flop / 1e9:.3g} GFLOP forward: --set {words}"


@dataclass(frozen=True)
class Universes:
    """Volumes as a network gets them, and targets, in memory: [N, C, D, H, W] and [N, 4]."""

    volumes: Tensor
    targets: Tensor

    @classmethod
    def of(cls, dataset: Dataset, standard: Standard) -> Universes:
        every = range(len(dataset))
        return cls(standard(dataset.read(every)), dataset.targets(every))


def universes(folder: Path, mesh: int, samples: int) -> tuple[Universes, Universes]:
    """To train on, and to judge by; what is missing in the folder is generated."""
    training = _dataset(folder, Recipe(mesh, 4, 0, samples))
    validation = _dataset(folder, Recipe(mesh, 4, VALIDATION_SEED, max(BATCH, samples // 4)))
    standard = Standard(training, "cpu")
    return Universes.of(training, standard), Universes.of(validation, standard)


def widest(base: Params, budget_flop: float) -> int:
    """The largest width whose forward pass of a sample stays within the budget; 0 where even the smallest does not."""
    step = HEAD_CHANNELS if base["family"] == "vit" else 1
    widths = range(step, WIDEST + 1, step)
    low, high = 0, len(widths)
    while low < high:
        middle = (low + high) // 2
        if spec.network({**base, "width": widths[middle]}).forward_flop <= budget_flop:
            low = middle + 1
        else:
            high = middle
    return widths[low - 1] if low else 0


def train(params: Params, learning_rate: float, steps: int, training: Universes, validation: Universes) -> float:
    """Validation error after `steps` steps of AdamW on random batches, learning rate rising and falling once."""
    torch.manual_seed(0)
    network = build(spec.network(params), dropout=0.0)
    execution.arrange(network, {**spec.PLAIN, "backend": "ddp"})
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(training.targets), (BATCH,))
        loss = nn.functional.mse_loss(network(training.volumes[chosen]), training.targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        outputs = torch.cat([network(each) for each in validation.volumes.split(BATCH)])
    return float((outputs - validation.targets).abs().mean())


def search(
    base: Params,
    families: Sequence[str],
    budget_flop: float,
    trials: int,
    steps: int,
    training: Universes,
    validation: Universes,
    seed: int = 0,
) -> list[Candidate]:
    """The candidates tried, best first.

    Raises:
        SaihError: optuna is not installed, or no architecture is within the budget.
    """
    optuna = _optuna()
    found: list[Candidate] = []

    def objective(trial: Any) -> float:
        family = str(trial.suggest_categorical("family", list(families)))
        depth = int(trial.suggest_int(f"{family} depth", 1, DEEPEST[family]))
        shape: dict[str, Value] = {"family": family, "depth": depth, "stages": 0}
        if family == "cosmoflow":
            shape["stages"] = int(trial.suggest_int("stages", 1, deepest(int(base["mesh"])) - 1))
        learning_rate = float(trial.suggest_float("learning rate", *LEARNING_RATES, log=True))
        shape["width"] = widest({**base, **shape}, budget_flop)
        if not shape["width"]:
            raise optuna.TrialPruned
        params = {**base, **shape}
        mae = train(params, learning_rate, steps, training, validation)
        found.append(Candidate(shape, spec.network(params).forward_flop, mae))
        return mae

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective, n_trials=trials)
    if not found:
        raise SaihError(f"no architecture tried is within {budget_flop / 1e9:g} GFLOP; give more, or more trials")
    return sorted(found, key=lambda each: each.mae)


def main(arguments: Sequence[str] | None = None) -> int:
    """Search, and print the best candidates beside the network of the ladder that is nearest in cost."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    base = {each.name: each.default for each in spec.PARAMETERS} | {"mesh": options.mesh}
    try:
        _optuna()
        training, validation = universes(options.folder, options.mesh, options.samples)
        budget_flop, families = options.gflop * 1e9, options.family or ["cosmoflow"]
        found = search(base, families, budget_flop, options.trials, options.steps, training, validation)
    except SaihError as error:
        print(f"search: {error}", file=sys.stderr)
        return 2
    label, rung = _nearest(base, budget_flop)
    params = {**base, **rung}
    mae = train(params, 1e-3, options.steps, training, validation)
    guess = float((validation.targets - training.targets.mean(0)).abs().mean())
    print(f"predicting the mean: MAE {guess:.4f}")
    print(f"model={label} of the ladder: {Candidate(rung, spec.network(params).forward_flop, mae)}")
    for candidate in found[:3]:
        print(candidate)
    return 0


def _dataset(folder: Path, recipe: Recipe) -> Dataset:
    generate(folder, recipe)
    return Dataset(folder, recipe)


def _nearest(base: Params, budget_flop: float) -> tuple[str, dict[str, Value]]:
    """The CosmoFlow rung of the model axis that costs most within the budget, or else the cheapest."""
    rungs = [rung for rung in spec.AXES[1].rungs if rung.params["family"] == "cosmoflow"]
    costs = [spec.network({**base, **rung.params}).forward_flop for rung in rungs]
    within = [place for place, flop in enumerate(costs) if flop <= budget_flop]
    chosen = rungs[max(within, key=costs.__getitem__) if within else 0]
    return chosen.label, dict(chosen.params)


def _optuna() -> Any:
    try:
        return importlib.import_module("optuna")
    except ImportError:
        raise SaihError("the search needs optuna: pip install 'saih[search]'") from None


def _count(text: str) -> int:
    """A whole number of at least one, or argparse's own line."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m workloads.cosmology.cosmoflow.search", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the universes are, or will be")
    parser.add_argument("--gflop", type=float, default=0.05, help="forward GFLOP of one sample, at the most (0.05)")
    parser.add_argument("--family", action="append", choices=list(DEEPEST), help="cosmoflow; give it twice for both")
    parser.add_argument("--mesh", type=_count, default=16, help="voxels per side (16)")
    parser.add_argument("--samples", type=_count, default=128, help="universes to train on; a quarter more judge (128)")
    parser.add_argument("--trials", type=_count, default=20, help="architectures to try (20)")
    parser.add_argument("--steps", type=_count, default=150, help="training steps of each, of 8 samples (150)")
    parser.add_argument("--threads", type=_count, default=1, help="threads (1)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
