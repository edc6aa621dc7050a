"""Copies of models that hold objects of ours, and pickles of them."""

from __future__ import annotations

import copy
import importlib
import pickle
from pathlib import Path

import pytest

import colltensor as col
from colltensor.gradients import Synchronizer


def test_a_group_is_refused_in_words(tmp_path: Path) -> None:
    group = col.init_collective_group(1, 0, init_method=f"file://{tmp_path / 'meet'}")
    try:
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match=r"group 'default' \(rank 0\)"):
                copied(group)
    finally:
        group.destroy()


@pytest.mark.needs("torch")
def test_a_models_copy_has_no_handle(tmp_path: Path) -> None:
    torch = importlib.import_module("torch")
    sync_gradients = importlib.import_module("colltensor.torch").sync_gradients
    group = col.init_collective_group(1, 0, init_method=f"file://{tmp_path / 'meet'}")
    try:
        model = torch.nn.Linear(2, 2)
        model.handle = sync_gradients(model)
        model.synchronizer = Synchronizer({"weight": model.weight.detach()})
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert copied.handle is None
            assert copied.synchronizer is None
            copied(torch.ones(1, 2)).sum().backward()
        model.handle.remove()
    finally:
        group.destroy()
