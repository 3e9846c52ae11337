"""Problems whose answers are checked by a program: one module a task, all with the same names.

`get_task(name)` gives the module. Examples are plain dicts that JSON can hold. Nothing here needs
jax.

    Options                     frozen dataclass, options of the generator; of gsm8k and math, whose
                                training problems are not made but read: the path of their file
    generate(count, seed, split="train", options=Options(), exclude=()) -> list[dict]
                                distinct examples, the same for the same arguments (and file)
                                everywhere; split is "train" or "heldout", which share no key
    key(example) -> str         identity of the problem, whatever the order it is written in
    prompt(example, style="compact") -> str
                                "compact" for character models, "instruct" for a chat's user turn
    demonstration(example) -> str
                                the completion that supervised training imitates (compact style)
    careless(example) -> str    a completion of the right form that does not try
    ALPHABET                    characters that compact prompts, demonstrations and careless
                                completions can hold
    reward(completions, examples) -> float32 [B], in [0, 1]
    score(completions, examples) -> float32 [B], 1 where the problem is solved, else 0
    load(path) -> list[dict]    examples of an evaluation file

Completions are model output and therefore hostile: they are never evaluated as code, and the work
spent on one is bounded apart from a linear search for its answer. What is not a string scores 0.
"""

import difflib
from types import ModuleType

from ais_jax.errors import UserError
from ais_jax.tasks import arithmetic, countdown, gsm8k, math, sudoku

_MODULES = {
    "countdown": countdown,
    "sudoku": sudoku,
    "arithmetic": arithmetic,
    "gsm8k": gsm8k,
    "math": math,
}
TASKS = tuple(_MODULES)


def get_task(name: str) -> ModuleType:
    """The module of the task `name`.

    Raises:
      UserError: there is no such task.
    """
    if name not in _MODULES:
        nearest = difflib.get_close_matches(str(name), TASKS, n=1, cutoff=0)[0]
        raise UserError(
            f"task {name!r} is unknown; did you mean {nearest!r}? Tasks: {', '.join(TASKS)}"
        )
    return _MODULES[name]
