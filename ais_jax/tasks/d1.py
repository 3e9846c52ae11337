"""The protocol of d1 (Zhao et al., arXiv 2504.12216): prompts, evaluation, training rewards.

Those who compare with d1 pose its prompts (`d1_prompts`), find answers as it does (`d1_counts`) and
learn from its rewards (`d1_rewards`). What judges is written anew: it gives the published outcome,
item by item, and evaluates nothing as code. The first 40,000 characters of a completion are read;
what is no string scores 0.
"""

from ais_jax.tasks.d1_counts import END, TASKS, counts, score
from ais_jax.tasks.d1_prompts import prompt
from ais_jax.tasks.d1_rewards import rewards

__all__ = ["END", "PREFILL", "TASKS", "counts", "prompt", "rewards", "score"]

PREFILL = "<reasoning>"
"""How the reply begins in evaluation."""
