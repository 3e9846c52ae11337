"""The pages on the correction are true to the code, and their example runs."""

import dataclasses
import pathlib
import re
import runpy

import jax.numpy as jnp
import pytest
import yaml

from ais_jax import PRESETS, AISConfig, Diagnostics

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def table(page: str, heading: str) -> list[list[str]]:
    """Cells of the rows of the first table below a heading, without its header."""
    section = (DOCS / page).read_text(encoding="utf-8").split(f"\n## {heading}\n")[1]
    lines = section[section.index("\n|") :].lstrip().split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.fixture(scope="module")
def custom_trainer(tmp_path_factory):
    """Global names of the page's Python blocks, run one after the other as one script."""
    page = (DOCS / "custom_trainer.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    script = tmp_path_factory.mktemp("docs") / "custom_trainer.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    return runpy.run_path(str(script))


def test_the_custom_trainer_learns(custom_trainer):
    history = custom_trainer["history"]
    assert history[0] < 0.2
    assert history[-1] > 0.9
    result = custom_trainer["result"]
    assert result.diagnostics.severity > 0
    assert 0 < result.coefficient < 1


def test_the_custom_trainers_micro_batches_add_up(custom_trainer):
    whole, summed = custom_trainer["whole"], custom_trainer["summed"]
    assert jnp.max(jnp.abs(whole)) > 1e-3
    assert jnp.max(jnp.abs(whole - summed)) < 1e-6 * jnp.max(jnp.abs(whole))


def test_every_setting_is_documented_with_its_default():
    found: dict = {}
    for names, defaults, _ in table("ais.md", "Settings"):
        pairs = zip(codes(names), codes(defaults), strict=True)
        found |= {name: yaml.safe_load(default) for name, default in pairs}
    assert found == {f.name: f.default for f in dataclasses.fields(AISConfig)}


def test_every_preset_is_documented_with_its_settings():
    found = {}
    for preset, _, settings in table("ais.md", "Baselines are settings"):
        (name,) = codes(preset)
        found[name] = AISConfig(**yaml.safe_load("\n".join(codes(settings)) or "{}"))
    assert found == PRESETS


def test_every_diagnostic_is_documented():
    rows = table("ais.md", "What is logged, and what to watch")
    assert {name for row in rows for name in codes(row[0])} == set(Diagnostics._fields)
