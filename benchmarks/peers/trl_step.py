"""Steps of TRL's GRPOTrainer on a model folder: a contestant, see worker.py.

A request is one step, from the prompts to the updated parameters.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import tokenizers
import torch
import transformers
import trl
from worker import Channel


class Paced(transformers.TrainerCallback):
    """Waits for a request before each step."""

    def __init__(self, channel: Channel):
        self._channel, self._requests = channel, channel.requests()

    def on_step_begin(self, args, state, control, **kwargs):
        if next(self._requests, None) is None:
            sys.exit()
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self._channel.done(seconds=time.perf_counter() - self._began)


def tokenizer_of(vocabulary: int) -> transformers.PreTrainedTokenizerFast:
    """Words "t0", "t1"..., an id each; the last two pad and end."""
    words = [f"t{i}" for i in range(vocabulary - 2)] + ["<pad>", "<eos>"]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="t0")
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="t0", pad_token="<pad>", eos_token="<eos>"
    )


def trainer_of(job: dict, channel: Channel) -> trl.GRPOTrainer:
    torch.set_num_threads(os.cpu_count() or 1)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["folder"], dtype=getattr(torch, job["dtype"])
    )
    texts = [" ".join(f"t{i}" for i in row) for row in job["prompts"]]
    length = job["new_tokens"]

    def reward(completions, **kwargs):
        return [float(len(set(text))) for text in completions]  # differs within a group

    config = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=job["rows"],
        num_generations=job["rows"],
        max_completion_length=length,
        generation_kwargs={"min_new_tokens": length},  # all rows reach the full length
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        learning_rate=1e-6,
        max_steps=10**6,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    return trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer_of(model.config.vocab_size),
        callbacks=[Paced(channel)],
    )


def main() -> None:
    channel = Channel()
    try:
        trainer = trainer_of(channel.job, channel)
        channel.ready(about=f"trl {trl.__version__}, torch {torch.__version__}")
        trainer.train()
    except Exception as error:
        channel.failed(error)


if __name__ == "__main__":
    main()
