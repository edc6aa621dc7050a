"""A Thinc model trained in Ray workers, its own gradients in step by a ``Synchronizer``.

    python examples/train_thinc.py --workers 2

Thinc's ``backprop`` adds up gradients in numpy arrays that belong to the model's layers.
``gradients_of`` collects them in a dict, ``synchronizer.sync`` replaces them by the mean over all
workers where they lie, and Thinc's optimizer takes them from there. The losses of all steps are
those of one process with the whole batches, to 2e-3 relative (Adam enlarges what sums in another
order leave), and so is the accuracy. Needs colltensor[ray], scikit-learn and thinc.
"""

from __future__ import annotations

import sys
from typing import Any

import digits
import numpy as np

import colltensor as col
from colltensor.gradients import Synchronizer

try:
    from thinc.api import (
        Adam,
        CategoricalCrossentropy,
        Model,
        Relu,
        Softmax,
        chain,
        fix_random_seed,
    )
except ModuleNotFoundError as missing:
    sys.exit(f"this example needs Thinc ({missing.name} is missing): pip install thinc")

HIDDEN = 64


def parameters_of(model: Model) -> dict[str, Any]:
    """The arrays of all layers' parameters, which are the model's own."""
    return {
        f"{number}.{name}": layer.get_param(name)
        for number, layer in enumerate(model.walk())
        for name in layer.param_names
        if layer.has_param(name)
    }


def gradients_of(model: Model) -> dict[str, Any]:
    """The arrays in which the layers have added up their gradients, which are the model's own."""
    return {
        f"{number}.{name}": layer.get_grad(name)
        for number, layer in enumerate(model.walk())
        for name in layer.param_names
        if layer.has_grad(name)
    }


def train(rank: int, world_size: int, steps: int) -> digits.Outcome:
    """Train on this worker's parts of the batches."""
    fix_random_seed(rank)
    images, labels = digits.load()
    model = chain(Relu(HIDDEN), Relu(HIDDEN), Softmax(digits.CLASSES)).initialize(
        X=images[:2], Y=np.eye(10)[:2]
    )
    if world_size > 1:
        col.broadcast(parameters_of(model))
        synchronizer = Synchronizer(parameters_of(model))
    optimizer = Adam(0.003)
    cross_entropy = CategoricalCrossentropy()
    losses = []
    for batch, truths in digits.batches(rank, world_size, steps):
        guesses, backprop = model.begin_update(batch)
        losses.append(float(-np.log(guesses[np.arange(len(truths)), truths]).mean()))
        backprop(cross_entropy.get_grad(guesses, truths))
        if world_size > 1:
            synchronizer.sync(gradients_of(model))
        model.finish_update(optimizer)
    right = model.predict(images).argmax(axis=1) == labels
    return digits.Outcome(digits.mean_over_workers(losses, world_size), float(right.mean()))


if __name__ == "__main__":
    sys.exit(digits.main(train, tolerance=2e-3))
