"""`generate` of transformers on a model folder: a contestant, see worker.py."""

from __future__ import annotations

import os
import time

import torch
import transformers
from worker import serve


def load(job: dict):
    torch.set_num_threads(os.cpu_count() or 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, job["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(job["folder"], dtype=dtype).to(device)
    model.eval()
    prompts = torch.tensor(job["prompts"], device=device)

    @torch.inference_mode()
    def run(request: dict) -> dict:
        ids = prompts[: request["rows"]]
        began = time.perf_counter()
        # The model has no end token, so that all rows reach the full length.
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request["new_tokens"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
        ).cpu()
        return {
            "seconds": time.perf_counter() - began,
            "tokens": out.shape[0] * (out.shape[1] - ids.shape[1]),
        }

    about = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return run, {"about": about}


if __name__ == "__main__":
    serve(load)
