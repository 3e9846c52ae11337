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
                                (of these and other styles see `pose`)
    demonstration(example) -> str
                                the completion that supervised training imitates (compact style)
    careless(example) -> str    a completion of the right form that does not try
    ALPHABET                    characters that compact prompts, demonstrations and careless
                                completions can hold
    reward(completions, examples) -> float32 [B], in [0, 1]
    score(completions, examples) -> float32 [B], 1 where the problem is solved, else 0
    load(path) -> list[dict]    examples of an evaluation file
    cells(completions, examples) -> (right [B], total [B])
                                optional: of how many parts of each problem how many are right
    MEASURES                    optional: further measures by name, (completions, examples) -> float
    gold(example) -> str        optional: the right answer, where there is one alone
    extract(completion) -> str | None
                                optional: the answer given, the same text for the same answer

Completions are model output and therefore hostile: they are never evaluated as code, and the work
spent on one is bounded apart from a linear search for its answer. What is not a string scores 0.
"""

import difflib
from types import ModuleType

from ais_jax.errors import UserError
from ais_jax.tasks import aime25, amc, arithmetic, common, countdown, d1, gsm8k, math, sudoku

_MODULES = {
    "countdown": countdown,
    "sudoku": sudoku,
    "arithmetic": arithmetic,
    "gsm8k": gsm8k,
    "math": math,
    "amc": amc,
    "aime25": aime25,
}
TASKS = tuple(_MODULES)
STYLES = (*common.STYLES, "d1", "d1_eval")


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


def name_of(task: ModuleType) -> str:
    """The name that `get_task` takes for a task's module."""
    return next(name for name, module in _MODULES.items() if module is task)


def pose(task: ModuleType, example: dict, style: str) -> tuple[str, str]:
    """(the problem as text, how the reply begins) in a style.

    "compact" and "instruct" are the task's own. "d1" and "d1_eval" are the prompts of d1 (arXiv
    2504.12216) in training and in evaluation, where the reply begins with <reasoning>.

    Raises:
      ValueError: the style is unknown, or d1 has none for the task.
    """
    if not style.startswith("d1"):
        return task.prompt(example, style), ""
    if style not in STYLES or name_of(task) not in d1.TASKS:
        raise ValueError(f"style={style!r} is for {', '.join(d1.TASKS)}, not {name_of(task)}")
    evaluation = style == "d1_eval"
    text = d1.prompt(name_of(task), example, evaluation)
    return text, d1.PREFILL if evaluation else ""
