"""The command line: `ais-jax train CONFIG [key=value ...]`."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import textwrap
from collections.abc import Sequence

from ais_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, or 2 after an error of one line."""
    parser = argparse.ArgumentParser(
        prog="ais-jax", description="GRPO with quantized rollouts, corrected by AIS."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_report(commands)
    args = parser.parse_args(argv)
    # transformers and jax chatter on standard error at import; a person's error must stand alone.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return args.run(args)
    except UserError as error:
        print(f"ais-jax: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ais-jax: interrupted", file=sys.stderr)
        return 130


def _add_train(commands) -> None:
    train = commands.add_parser(
        "train",
        help="train a policy",
        description="Trains a policy as a YAML file says.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    train.add_argument("config", help="a YAML file, such as configs/countdown_tiny.yaml")
    train.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace those of the file"
    )
    train.add_argument("-h", "--help", action=_TrainHelp)
    train.set_defaults(run=_train)


class _TrainHelp(argparse.Action):
    """Prints usage and every key; built when asked for, since it reads the whole tree."""

    def __init__(self, option_strings, dest):
        super().__init__(option_strings, dest, nargs=0, help="show this and every key, and exit")

    def __call__(self, parser, namespace, values, option_string=None):
        from ais_jax import settings
        from ais_jax.config import Config

        lines = ["keys:"]
        for key, kind, default, doc in settings.describe(Config):
            lines.append(f"  {key} ({kind}, default {default})")
            lines += textwrap.wrap(doc, 90, initial_indent="      ", subsequent_indent="      ")
        parser.epilog = "\n".join(lines)
        parser.print_help()
        parser.exit()


def _train(args) -> int:
    import jax

    from ais_jax import config as config_lib
    from ais_jax.train.run import cache_directory, train

    config = config_lib.load(args.config, args.overrides)
    # A second run starts without compiling, unless JAX is told another place.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))
    train(config, name=pathlib.Path(args.config).stem)
    return 0


def _add_report(commands) -> None:
    report = commands.add_parser("report", help="draw a run's curves again")
    report.add_argument(
        "run_dir", help="a folder that a run wrote, such as runs/countdown_tiny-..."
    )
    report.set_defaults(run=_report)


def _report(args) -> int:
    from ais_jax import report

    print(report.curves(args.run_dir))
    return 0
