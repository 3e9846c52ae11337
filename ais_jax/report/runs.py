"""The page of any runs: those that differ in their seed alone are one line."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from ais_jax import settings
from ais_jax.errors import UserError
from ais_jax.report import page
from ais_jax.report.curves import curves
from ais_jax.report.figures import Curves, draw
from ais_jax.train.metrics import read_metrics


def report(folders: Sequence[pathlib.Path], output: pathlib.Path | None = None) -> pathlib.Path:
    """Draws runs side by side, as PNG and as one page.

    Args:
      folders: of runs, or such that hold runs further below, as a study's does. The curves.png of
        each run that is named itself is drawn again.
      output: folder of the pictures; None is `report` in the one folder that is given, or here.

    Returns:
      Path of the page.

    Raises:
      UserError: a folder holds no run, or a run has no steps yet.
    """
    found: list[pathlib.Path] = []
    for folder in folders:
        runs = [folder] if (folder / "metrics.jsonl").exists() else _below(folder)
        if runs == [folder]:
            curves(folder)
        found += [run for run in runs if run not in found]
    if output is None:
        output = (folders[0] if len(folders) == 1 else pathlib.Path()) / "report"
    title = ", ".join(folder.resolve().name for folder in folders)
    return page.write(output, title, draw(_grouped(found)))


def _below(folder: pathlib.Path) -> list[pathlib.Path]:
    runs = sorted(path.parent for path in folder.rglob("metrics.jsonl"))
    if not runs:
        raise UserError(f"{folder} holds no run: there is no metrics.jsonl in it")
    return runs


def _grouped(runs: Sequence[pathlib.Path]) -> list[Curves]:
    """Arms, in the order of their first runs."""
    groups: dict[str, list[pathlib.Path]] = {}
    recipes: dict[str, str] = {}
    for run in runs:
        path = run / "config.yaml"
        tree: dict[str, Any] = {"output_dir": str(run)}
        if path.exists():
            tree = settings.load_yaml(path)
        rollout = tree.get("rollout")
        recipe = str(rollout.get("recipe")) if isinstance(rollout, dict) else "unknown"
        if isinstance(tree.get("train"), dict):
            tree["train"].pop("seed", None)
            tree.pop("output_dir", None)
        key = repr(tree)
        groups.setdefault(key, []).append(run)
        recipes[key] = recipe
    found = []
    names = _names(list(groups.values()))
    for (key, members), name in zip(groups.items(), names, strict=True):
        rows = [read_metrics(run / "metrics.jsonl") for run in members]
        for run, of_run in zip(members, rows, strict=True):
            if not of_run:
                raise UserError(f"{run} holds no steps yet: train for at least one step")
        found.append(Curves(name, recipes[key], rows))
    return found


def _names(groups: Sequence[Sequence[pathlib.Path]]) -> list[str]:
    """Of each group: of one run its folder, of several the one that they are in.

    With as many of the folders above them as tell the groups apart.
    """
    places = []
    for members in groups:
        first = members[0].resolve()
        together = len(members) > 1 and all(m.resolve().parent == first.parent for m in members)
        places.append(first.parent.parts if together else first.parts)
    for count in range(1, max(map(len, places)) + 1):
        names = ["/".join(parts[-count:]) for parts in places]
        if len(set(names)) == len(names):
            break
    return names
