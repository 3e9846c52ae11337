"""The command line: train, compare, report, eval, score, generate, convert, aot."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import textwrap
from collections.abc import Sequence

from ais_jax import compilation, memory
from ais_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code.

    0, 1 where `aot` finds that something does not fit or a part of a study failed, 2 after an error
    of one line. A training run that is told to leave by SIGTERM raises SystemExit(143) once it is
    saved.
    """
    parser = argparse.ArgumentParser(
        prog="ais-jax", description="GRPO with quantized rollouts, corrected by AIS."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_compare(commands)
    _add_report(commands)
    _add_eval(commands)
    _add_score(commands)
    _add_generate(commands)
    _add_convert(commands)
    _add_aot(commands)
    args, more = parser.parse_known_args(argv)
    if more:  # argparse takes no overrides behind an option
        if any(text.startswith("-") for text in more) or not hasattr(args, "overrides"):
            parser.error(f"unrecognized arguments: {' '.join(more)}")
        args.overrides += more
    # transformers and jax chatter on standard error at import; a person's error must stand alone.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return args.run(args)
    except UserError as error:
        # What a file holds may end up in the message; it must not steer the terminal.
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))
        print(f"ais-jax: error: {text}", file=sys.stderr)
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
    _add_processes(train)
    train.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on from the newest checkpoint in output_dir (default); --no-resume begins again, "
        "and renames what is there",
    )
    train.add_argument("-h", "--help", action=_TrainHelp)
    train.set_defaults(run=_train)


def _add_processes(command) -> None:
    group = command.add_argument_group(
        "several processes",
        "Only where they are not found by themselves, see docs/launch.md. The environment may say "
        "the same: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID.",
    )
    add = group.add_argument
    add("--coordinator", metavar="HOST:PORT", help="of process 0, the same for all")
    add("--processes", type=int, metavar="N", help="how many there are")
    add("--process-id", type=int, metavar="I", help="which one this is, from 0")


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
            indent = "      "
            lines += textwrap.wrap(
                doc, 90, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
            )
        parser.epilog = "\n".join(lines)
        parser.print_help()
        parser.exit()


def _train(args) -> int:
    memory.keep_freed()
    from ais_jax import config as config_lib
    from ais_jax import distributed
    from ais_jax.train.run import train

    config = config_lib.load(args.config, args.overrides)
    distributed.start(args.coordinator, args.processes, args.process_id)
    compilation.keep()
    train(config, name=pathlib.Path(args.config).stem, resume=args.resume)
    return 0


def _add_compare(commands) -> None:
    compare = commands.add_parser(
        "compare",
        help="run a study: arms and seeds over one configuration",
        description="Runs what a study still lacks, and writes tables, figures and a page. The "
        "same command goes on where it was stopped. See docs/study.md.",
    )
    add = compare.add_argument
    add("study", help="a YAML file, such as configs/study_countdown.yaml")
    add("overrides", nargs="*", metavar="key=value", help='such as "seeds=[5,6]"')
    add("--output", metavar="DIR", help="default runs/<name of the file>")
    add("--jobs", type=int, default=1, metavar="N", help="processes, which share the cores")
    add("--minutes", type=float, metavar="M", help="begin nothing new after this long")
    add("--arms", metavar="NAME,...", help="these arms alone")
    add("--only", choices=("runs", "gradients"), help="train, or measure gradients, alone")
    compare.set_defaults(run=_compare)


def _compare(args) -> int:
    from ais_jax.study.compare import compare, default_folder

    folder = default_folder(args.study) if args.output is None else pathlib.Path(args.output)
    arms = () if args.arms is None else _names(args.arms)
    found = compare(args.study, args.overrides, folder, args.jobs, args.minutes, arms, args.only)
    print(folder / "report.html")
    return int(any(found.failed.values()))


def _add_report(commands) -> None:
    report = commands.add_parser(
        "report",
        help="draw runs side by side",
        description="Draws runs, as PNG and as one HTML page. Runs that differ in train.seed alone "
        "are one line, their mean.",
    )
    report.add_argument(
        "runs", nargs="+", metavar="RUN", help="the folder of a run, or one with runs in it"
    )
    report.add_argument(
        "--output", metavar="DIR", help="default: report, in the one folder that is given, or here"
    )
    report.set_defaults(run=_report)


def _report(args) -> int:
    from ais_jax.report.runs import report

    output = None if args.output is None else pathlib.Path(args.output)
    print(report([pathlib.Path(run) for run in args.runs], output))
    return 0


_MODEL = "a checkpoint folder in Hugging Face format, a GGUF file, or the folder of a run"


def _add_sampling(command) -> None:
    add = command.add_argument
    add("--thinking", choices=("on", "off"), help="enable_thinking of the chat template")
    add("--temperature", type=float, default=0.0, metavar="T", help="default 0, greedy")
    add("--top-k", type=int, default=0, metavar="K", help="draw from the K most probable tokens")
    add("--top-p", type=float, default=1.0, metavar="P", help="from the fewest that reach P")
    add("--seed", type=int, default=0, metavar="N", help="default 0")
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="of parameters and activations; default float32 on a CPU, bfloat16 elsewhere",
    )
    add(
        "--diffusion",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="of diffusion models, keys of rollout.diffusion: block_length=32 steps=64 ...",
    )


def _thinking(args) -> bool | None:
    return None if args.thinking is None else args.thinking == "on"


def _dtype(args) -> str:
    import jax

    return args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


def _add_generate(commands) -> None:
    generate = commands.add_parser(
        "generate", help="complete a prompt", description="Shows what a model writes."
    )
    add = generate.add_argument
    add("model", help=_MODEL)
    add("prompt", help="a user's turn, where the model has a chat template")
    add("--system", metavar="TEXT", help="system message")
    add("--raw", action="store_true", help="continue the prompt as it is, without a template")
    add("--recipe", default="none", help="quantization: fp8, int8, ..., or auto (default none)")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="default 256")
    add("--min-p", type=float, default=0.0, metavar="P", help="from those with P of the largest")
    add("--samples", type=int, default=1, metavar="N", help="completions, default 1")
    _add_sampling(generate)
    generate.set_defaults(run=_generate)


def _generate(args) -> int:
    memory.keep_freed()
    import jax

    from ais_jax import generate, policies
    from ais_jax.recipes import choose_recipe

    recipe, backend = args.recipe, jax.default_backend()
    if recipe == "auto":
        recipe, why = choose_recipe(backend, jax.devices()[0].device_kind, args.samples)
        print(f"recipe {recipe}: {why}", file=sys.stderr)
    options = generate.Options(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        recipe=recipe,
        seed=args.seed,
        samples=args.samples,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        diffusion=_diffusion(args.diffusion),
    )
    policy = policies.load_policy(args.model, _dtype(args))
    tokenizer = policies.need_tokenizer(policy, args.model)
    ids = generate.prompt_ids(tokenizer, args.prompt, args.system, _thinking(args), args.raw)
    compilation.keep()
    result = generate.generate(policy.structure, policy.params, tokenizer, ids, options)
    for text in result.texts:
        print(text, flush=True)
    rate = result.tokens / result.seconds
    print(f"{result.tokens} tokens, {rate:.1f} tokens/s", file=sys.stderr)
    return 0


def _diffusion(overrides: list[str]):
    from ais_jax import settings
    from ais_jax.sampling import DiffusionConfig

    if not overrides:
        return None
    return settings.build(DiffusionConfig, _changes(overrides), "--diffusion")


def _changes(overrides: list[str]) -> dict:
    from ais_jax import settings

    return settings.apply_overrides({}, [settings.parse_override(text) for text in overrides])


def _add_eval(commands) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="measure a model on benchmarks",
        description="Measures a model on benchmarks, writes every generation and a table, and goes "
        "on where it was stopped. See docs/evaluation.md.",
    )
    add = evaluate.add_argument
    add("model", help=_MODEL)
    add("--task", required=True, metavar="NAMES", help="with commas: gsm8k, math500, amc, ...")
    add("--lengths", default="256", metavar="N,...", help="most tokens of a completion, each alone")
    add("--recipe", default="none", metavar="NAMES", help="with commas, such as none,fp8")
    add("--protocol", choices=("own", "d1"), help="prompts and scorer; d1 for diffusion models")
    add("--samples", type=int, default=1, metavar="N", help="completions of a problem, default 1")
    add("--data", metavar="SOURCE", help="a file, hf:NAME[:CONFIG]:SPLIT, or generated:N")
    add("--limit", type=int, metavar="N", help="only the first N problems")
    add("--batch-size", type=int, default=32, metavar="N", help="completions at a time, default 32")
    add("--tensor", type=int, default=1, metavar="N", help="devices that share each layer")
    add("--output", metavar="DIR", help="folder of the results; one that is there goes on")
    _add_sampling(evaluate)
    evaluate.set_defaults(run=_eval)


def _eval(args) -> int:
    memory.keep_freed()
    from ais_jax.evaluation import run

    options = run.Options(
        benchmarks=_names(args.task),
        lengths=_lengths(args.lengths),
        recipes=_names(args.recipe),
        samples=args.samples,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        protocol=args.protocol,
        thinking=_thinking(args),
        data=args.data,
        limit=args.limit,
        batch_size=args.batch_size,
        seed=args.seed,
        diffusion=_changes(args.diffusion),
        tensor=args.tensor,
    )
    compilation.keep()
    run.say(run.evaluate(args.model, options, args.output, _dtype(args)))
    return 0


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


def _lengths(text: str) -> tuple[int, ...]:
    names = _names(text)
    if not all(name.isdecimal() and len(name) < 8 for name in names):
        raise UserError(
            f"--lengths {text!r} must be whole numbers below 10,000,000, such as 128,256"
        )
    return tuple(map(int, names))


def _add_score(commands) -> None:
    score = commands.add_parser(
        "score",
        help="score generations that are there",
        description="Puts generations through every scorer of a benchmark. Reads what `ais-jax "
        "eval` writes, and the files that d1 publishes.",
    )
    score.add_argument("files", nargs="+", help="generations, pooled")
    score.add_argument("--task", required=True, metavar="NAME", help="gsm8k, math500, sudoku, ...")
    score.add_argument("--data", metavar="SOURCE", help="problems, where not the published file's")
    score.set_defaults(run=_score)


def _score(args) -> int:
    from ais_jax.evaluation.rescore import rescore

    for scorer, count, (value, error) in rescore(args.files, args.task, args.data):
        print(f"{scorer}: {100 * value:.2f} ± {100 * error:.2f} % of {count} generations")
    return 0


def _add_convert(commands) -> None:
    convert = commands.add_parser(
        "convert",
        help="write a model in another format",
        description="Writes a checkpoint, a GGUF file or what a run has trained as a new folder.",
    )
    add = convert.add_argument
    add("model", help=_MODEL)
    add("target", help="a folder that is absent or empty")
    add(
        "--to",
        choices=("hf", "orbax", "adapter"),
        default="hf",
        help="hf: for transformers and vLLM (default); orbax: for pods; adapter: a run's, for peft",
    )
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default bfloat16")
    convert.set_defaults(run=_convert)


def _convert(args) -> int:
    from ais_jax.convert import convert

    print(convert(args.model, args.target, args.to, args.dtype))
    return 0


def _add_aot(commands) -> None:
    aot = commands.add_parser(
        "aot",
        help="compile a config for devices that are not there",
        description="Compiles the programs of a step for a topology, and says what each needs, how "
        "long it would take at least and whether it fits. Exits with 1 if one does not.",
    )
    add = aot.add_argument
    add("config", help="a YAML file, such as configs/qwen3_8b_gsm8k.yaml")
    add("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    add(
        "--topology",
        required=True,
        metavar="NAME",
        help="a TPU slice by its chips along each axis: v5e:4x4, v5p:4x4x4, v6e:4x4, tpu7x:2x2x1; "
        "or cuda:1x1x8, slices, hosts and GPUs",
    )
    add(
        "--program",
        action="append",
        default=[],
        metavar="NAME",
        help="compile this one alone; may be repeated: quantize, prefill, decode and grow (of "
        "diffusion models rollout), score, update",
    )
    add("--gpu-target", metavar="FILE", help="of GPUs, XLA's GpuTargetConfigProto as text")
    aot.set_defaults(run=_aot)


def _aot(args) -> int:
    # Whatever accelerator this machine has is not the one that is compiled for.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from ais_jax import config as config_lib
    from ais_jax.aot import aot

    config = config_lib.load(args.config, args.overrides)
    return 0 if aot(config, args.topology, args.program, args.gpu_target) else 1
