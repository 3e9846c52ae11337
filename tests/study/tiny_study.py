"""A study whose runs take seconds."""

import json
import pathlib

from tiny_job import QWEN3

from ais_jax.settings import apply_overrides, parse_override

BASE = {
    "model": {"qwen3": QWEN3},
    "task": {
        "name": "arithmetic",
        "train_examples": 64,
        "heldout_examples": 8,
        "arithmetic": {"max_number": 9},
    },
    "warmup": {"steps": 3, "cache": False},
    "rollout": {"max_prompt_tokens": 8, "max_new_tokens": 6},
    "grpo": {"batch_size": 8, "group_size": 4},
    "rewards": {"train.reward_functions:varied": 1.0},
    "train": {"dtype": "float32", "steps": 4, "eval_every": 2, "eval_samples": 2},
}
STUDY = {
    "base": "base.yaml",
    "baseline": "exact",
    "seeds": [0, 1],
    "arms": {
        "exact": {"recipe": "none"},
        "int4": {"recipe": "int4"},
        "int4_tis": {"recipe": "int4", "correction": "tis", "train": False},
        "int4_auto": {
            "recipe": "int4",
            "correction": "ais",
            "train": False,
            "settings": {"ais": {"severity_scale": "auto"}},
        },
    },
}
GRADIENTS = {"along": ["int4"], "steps": [0, 2], "batches": 6, "blocks": 3}


def write(folder: pathlib.Path, *changes: str, **parts) -> pathlib.Path:
    """The study's file, with overrides and further top-level keys."""
    study = apply_overrides({**STUDY, **parts}, [parse_override(text) for text in changes])
    for name, tree in (("base", BASE), ("study", study)):
        (folder / f"{name}.yaml").write_text(json.dumps(tree))  # JSON is YAML
    return folder / "study.yaml"
