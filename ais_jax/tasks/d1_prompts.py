"""d1's prompts, word by word, with their quirks (github.com/dllm-reasoning/d1, Apache-2.0)."""

from __future__ import annotations

_TAGS = """
Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>
"""
_GRID_RULES = """
Please solve the following 4x4 Sudoku puzzle. The puzzle is provided as a 16-character string \
reading left-to-right, top-to-bottom, where '0' represents empty cells.

Rules:
- Fill empty cells with digits 1-4
- Each row must contain digits 1-4 exactly once
- Each column must contain digits 1-4 exactly once
- Each 2x2 box must contain digits 1-4 exactly once

Important: Your solution must be a COMPLETE 16-character string with only the digits 1-4, \
representing your final solved grid.

Respond in this exact format:
<reasoning>
Your step-by-step solving process
</reasoning>
<answer>
[16-character solution string with no spaces or separators]
</answer>
"""
_BOXED_TAGS = """Respond in the following format:
<reasoning>
Your reasoning here
</reasoning>
<answer>
\\boxed{...}
</answer>"""
_EXPERT = (
    "You are a math expert. You will be given a question to solve. Solve it step by step. Wrap the "
    "final answer in a \\boxed{}."
)
_EVALUATION = {
    "gsm8k": f"{_EXPERT} \n{_BOXED_TAGS}",
    "math": f'{_EXPERT}\n{_BOXED_TAGS}" \n',  # a stray quotation mark, also in d1's
    "countdown": "Using only the provided numbers, create an arithmetic expression that evaluates "
    "to exactly the provided target number. You may use the operations +, -, *, and / as needed, "
    "but each number must be used exactly once. Think step-by-step. After reasoning, provide only "
    "your final expression inside \\boxed{} tags without including an equals sign or the target "
    f"number. For example: \\boxed{{a + b * c}}{_BOXED_TAGS}",
    "sudoku": _GRID_RULES,
}


def prompt(task: str, example: dict, evaluation: bool) -> str:
    """A problem as a user's turn: of d1's evaluation, or of its training, which differs."""
    if evaluation:
        return f"{_EVALUATION[task]}\n\n{_question(task, example)}"
    if task == "gsm8k":
        return f"{_TAGS}\n\n{example['question']}"
    if task == "math":
        return (
            f"{_TAGS}\n\nYou are a math expert. You will be given a question to solve. Solve it "
            f"step by step. Wrap the final answer in a \\boxed{{}}. \n\n{example['problem']}"
        )
    if task == "sudoku":
        return f"{_GRID_RULES}\n\n{_question(task, example)}"
    return (
        f"{_TAGS}\nUsing only the numbers {example['numbers']}, create an arithmetic expression "
        f"that evaluates to exactly {example['target']}. You must use all numbers from the list, "
        "and each number must be used exactly once. You may use the operations +, -, *, and / as "
        "needed. After reasoning, provide only your final expression inside <answer></answer> tags "
        "without including an equals sign or the target number. For example, if the numbers are "
        "[2, 3, 4] and the target is 5, a valid answer is: <answer>\n2*4-3\n</answer>"
    )


def _question(task: str, example: dict) -> str:
    if task == "gsm8k":
        return example["question"]
    if task == "math":
        return example["problem"]
    if task == "countdown":
        return f"Numbers: {example['numbers']}\nTarget: {example['target']}"
    return f"Solve the following Sudoku puzzle: {example['puzzle']}\n"
