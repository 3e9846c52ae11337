"""What to change where a program does not fit: settings, by the memory that they would free."""

from __future__ import annotations

from typing import NamedTuple

from ais_jax import mesh as mesh_lib
from ais_jax.aot import programs as programs_lib
from ais_jax.aot.compile import Result
from ais_jax.aot.programs import Shapes, bytes_on_a_device
from ais_jax.train.setup import Run

_DECODING = ("prefill", "decode", "grow")
_LEARNING = ("score", "update")


class Advice(NamedTuple):
    """A setting that helps."""

    setting: str
    freed: float  # bytes of a device, roughly
    where: str = ""  # if that takes other devices


def advise(run: Run, shapes: Shapes, result: Result, count: int = 3) -> list[Advice]:
    """The settings that would free most for a program, the best first.

    How much is an estimate: of arrays by their share, of temporaries as if they were proportional.
    """
    held = {name: bytes_on_a_device(tree) for name, tree in shapes.held.items()}
    memory = result.memory
    own = memory.temporaries
    if own is None:  # the compiler gave up: what is neither array nor stated is temporary
        own = max(memory.peak - sum(held[name] for name in result.program.takes), 0)
    name = result.program.name
    found = _of_state(run, held)
    if name in _DECODING:
        found += _of_decoding(run, shapes, own, name)
    elif name in _LEARNING:
        found += _of_learning(run, own, name)
    elif name == "rollout":
        half = run.config.grpo.batch_size // 2
        found.append(Advice(f"grpo.batch_size={half}", own / 2))
    return sorted((a for a in found if a.freed > 0), key=lambda a: -a.freed)[:count]


def _of_state(run: Run, held: dict[str, int]) -> list[Advice]:
    """What lies in memory whatever runs."""
    config, mesh = run.config, run.programs.mesh
    state = held["parameters"] + held["moments"]
    found = []
    if config.model.lora is None:
        # 12 bytes a parameter, of which a base in bfloat16 keeps 2.
        found.append(Advice("model.lora.rank=32", state * 5 / 6))
    elif config.model.lora.rank > 1:
        halved = config.model.lora.rank // 2
        found.append(Advice(f"model.lora.rank={halved}", (state + held["reference"]) / 2))
    if config.model.lora is not None and config.model.lora.base_recipe == "none":
        found.append(Advice("model.lora.base_recipe=int8_weight_only", held["frozen base"] / 2))
    if mesh.shape["data"] > 1:
        split = mesh_lib.batch_devices(mesh)
        freed = (state + held["frozen base"]) * (1 - 1 / mesh.shape["data"])
        found.append(Advice(f"mesh.data=1 mesh.fsdp={split}", freed))
    wider = 2 * mesh.shape["tensor"]
    if mesh.shape["fsdp"] % 2 == 0 and _heads(run) % wider == 0:
        setting = f"mesh.fsdp={mesh.shape['fsdp'] // 2} mesh.tensor={wider}"
        found.append(Advice(setting, held["rollout copy"] / 2))
    if held["reference"]:
        found.append(Advice("grpo.kl_coef=0", held["reference"]))
    more = (state + held["frozen base"]) / 2
    found.append(Advice(f"mesh.fsdp={2 * mesh.shape['fsdp']}", more, " on twice the chips"))
    if config.rollout.recipe == "none":
        found.append(Advice("rollout.recipe=int8", held["rollout copy"] / 2))
    return found


def _heads(run: Run) -> int:
    """Key and value heads."""
    sizes = run.policy.model.config
    return getattr(sizes, "num_key_value_heads", 0) or getattr(sizes, "n_kv_heads", 1)


def _of_decoding(run: Run, shapes: Shapes, own: float, name: str) -> list[Advice]:
    config, mesh = run.config.rollout, run.programs.mesh
    state = programs_lib.decoding_state(run, shapes, programs_lib.longest(run))
    cache = bytes_on_a_device(state.cache)
    # Growing holds the cache twice, and so may prefill.
    caches = cache * (2 if name == "grow" else 1)
    rows = programs_lib.rows_at_a_time(run) // 2
    found = []
    if rows % mesh_lib.batch_devices(mesh) == 0 and rows:
        found.append(Advice(f"rollout.slots={rows}", (caches + own) / 2))
    if config.kv_cache == "none":
        found.append(Advice("rollout.kv_cache=int8_kv", caches * 0.47))
    half = config.max_new_tokens // 2
    if half:
        share = half / (config.max_prompt_tokens + config.max_new_tokens)
        found.append(Advice(f"rollout.max_new_tokens={half}", caches * share))
    if name == "prefill" and config.max_prompt_tokens > config.prefill_chunk // 2:
        found.append(Advice(f"rollout.prefill_chunk={config.prefill_chunk // 2}", own / 2))
    return found


def _of_learning(run: Run, own: float, name: str) -> list[Advice]:
    config, found = run.config, []
    rows = config.grpo.rows // 2
    if rows and rows % mesh_lib.batch_devices(run.programs.mesh) == 0:
        found.append(Advice(f"grpo.micro_batch_size={rows}", own / 2))
    if name == "update" and not config.train.remat:
        found.append(Advice("train.remat=true", own * 0.7))
    half = config.rollout.max_new_tokens // 2
    if half:
        length = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
        found.append(Advice(f"rollout.max_new_tokens={half}", own * half / length))
    return found
