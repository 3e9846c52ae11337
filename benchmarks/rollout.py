"""Autoregressive rollouts beside their alternatives, and beside what the machine can do.

    python benchmarks/rollout.py ac --model 0.6b --repeats 3 --output FILE
    python benchmarks/rollout.py b --model 71m --peer transformers=PYTHON --peer tunix=PYTHON

a  bfloat16 against quantized rollouts, and the mismatch of each with the trainer
b  against transformers' generate, Tunix' sampler and a step of TRL's GRPOTrainer (--peer)
c  bytes and operations a second of decoding, as shares of the machine's
d  where the time of a GRPO step goes

Whoever is compared is a process of its own, and they take turns, so a machine that drifts shifts
all of them. Weights are random: times are those of a trained model, texts are not.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shlex
import sys

# Of a GPU, this process only wants to know its name.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
from common import load, machine
from rollout_breakdown import breakdown
from rollout_options import Options
from rollout_peers import SAMPLERS, TRL, peers
from rollout_recipes import shares, speeds
from rollout_shapes import CONFIGS, count

PARTS = {
    "a": ("Quantized against bfloat16", speeds),
    "b": ("Against others", peers),
    "c": ("Shares of what the machine can do", shares),
    "d": ("Where a step's time goes", breakdown),
}
LENGTHS = {
    "tiny": (16, 16),
    "71m": (64, 128),
    "100m": (64, 128),
    "0.6b": (64, 64),
    "8b": (256, 1024),
}
RECIPES = {
    "cpu": ("none", "int8", "int8_head"),
    "gpu": ("none", "fp8", "fp8+fp8_kv", "fp8_weight_only"),
    "tpu": ("none", "int8", "fp8"),
}


def parse(arguments: list[str] | None = None) -> tuple[str, Options, pathlib.Path | None]:
    """(parts, options, file for the tables) of a command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", help="letters, such as ac")
    parser.add_argument("--model", choices=tuple(CONFIGS), default="71m")
    parser.add_argument("--rows", help="with commas; 1,8,64,256, and 8 for part b")
    parser.add_argument("--recipes", help="with commas; the first is what others are compared with")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--prompt", type=int, help="tokens of a prompt")
    parser.add_argument("--new", type=int, help="tokens of a completion, two or more")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that are counted")
    parser.add_argument("--peer", action="append", default=[], help="NAME=PYTHON of part b")
    parser.add_argument(
        "--config", action="append", help="job of part d; configs/countdown_tiny.yaml"
    )
    parser.add_argument(
        "--alone", action="store_true", help="no two processes at a time, as with 8b"
    )
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that a run may take")
    parser.add_argument("--output", type=pathlib.Path, help="file for the tables")
    args = parser.parse_args(arguments)
    if not args.parts or not set(args.parts) <= PARTS.keys():
        parser.error(f"parts {args.parts!r} must be letters of {''.join(PARTS)}")
    named = dict(peer.partition("=")[::2] for peer in args.peer)
    unknown = named.keys() - {*SAMPLERS, TRL}
    if unknown or not all(named.values()):
        parser.error(f"--peer must be NAME=PYTHON, NAME one of {', '.join([*SAMPLERS, TRL])}")
    if args.new is not None and args.new < 2:
        parser.error(f"--new {args.new} must be 2 or more: the first token is part of the prefill")
    platform = jax.default_backend()
    prompt, new = LENGTHS[args.model]
    recipes = args.recipes.split(",") if args.recipes else RECIPES[platform]
    rows, peer_rows = (
        tuple(int(r) for r in (args.rows or default).split(",")) for default in ("1,8,64,256", "8")
    )
    options = Options(
        model=args.model,
        platform=platform,
        dtype=args.dtype,
        recipes=tuple(recipes),
        rows=rows,
        peer_rows=peer_rows,
        prompt_tokens=args.prompt or prompt,
        new_tokens=args.new or new,
        repeats=args.repeats,
        peers=tuple(named.items()),
        configs=tuple(args.config or ["configs/countdown_tiny.yaml"]),
        alone=args.alone or args.model == "8b",
        timeout=args.timeout,
    )
    return args.parts, options, args.output


def header(options: Options) -> list[str]:
    c = CONFIGS[options.model]
    return [
        f"# Rollouts: {options.model}\n",
        f"    python {shlex.join(sys.argv)}\n",
        f"{machine()}. {load()} as it began.\n",
        f"Qwen3 of {count(c) / 1e6:,.1f} M random parameters: {c.num_hidden_layers} blocks of "
        f"width {c.hidden_size}, {c.num_attention_heads} query and {c.num_key_value_heads} key "
        f"heads of {c.head_dim}, feed-forward {c.intermediate_size}, vocabulary "
        f"{c.vocab_size:,}{', tied' if c.tie_word_embeddings else ''}. Medians (least to largest) "
        f"of {options.repeats} rounds, in each of which every contestant has one turn; ratios are "
        "those of a round.",
    ]


def main() -> None:
    parts, options, output = parse()
    lines = header(options)
    print("\n".join(lines), flush=True)
    for part in parts:
        title, measure = PARTS[part]
        new = [f"\n## {title}\n", *measure(options), f"\n{load()} as it ended."]
        print("\n".join(new), flush=True)
        lines += new
        if output:
            output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
