"""A real vLLM with esparse's plug-in, in its own environment and process: reads jobs, answers with what was generated.

    PYTHONPATH=... ENVIRONMENT/bin/python tests/vllm/engine.py JOBS.json ANSWERS.json

A job: the arguments of LLM(...), prompts as lists of tokens, how many tokens to generate. An answer: the tokens, the
log-probability of each, how many of a prompt's tokens came from the prefix cache, the bytes of all parameters; seconds
by the clock, and those of the processor for this process, which the engine is a part of.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def stored_bytes(model: Any) -> int:
    """Of all parameters, each counted once; `getattr` sees those that vLLM keeps under other names on a CPU."""
    return sum(value.nbytes for value in {id(value): value for value in model.parameters()}.values())


def answer(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    usual = {"max_model_len": 256, "max_num_seqs": 8, "enforce_eager": True, "disable_log_stats": True}
    llm = LLM(**(usual | job["engine"]))
    asked = SamplingParams(temperature=0, max_tokens=job["tokens"], logprobs=1, ignore_eos=True)
    outputs = []
    for prompts in job["batches"]:
        began, worked = time.perf_counter(), time.process_time()
        of_batch = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False)
        seconds, processor_seconds = time.perf_counter() - began, time.process_time() - worked
        outputs.append(
            {
                "seconds": seconds,
                "processor_seconds": processor_seconds,
                "tokens": [list(one.outputs[0].token_ids) for one in of_batch],
                "logprobs": [
                    [
                        of_token[token].logprob
                        for of_token, token in zip(one.outputs[0].logprobs, one.outputs[0].token_ids, strict=True)
                    ]
                    for one in of_batch
                ],
                "cached": [one.num_cached_tokens for one in of_batch],
            }
        )
    [size] = llm.apply_model(stored_bytes) if job["engine"].get("tensor_parallel_size", 1) == 1 else [None]
    return {"batches": outputs, "bytes": size}


def main() -> None:
    jobs, place = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    if len(jobs) == 1:
        try:
            answers = [answer(jobs[0])]
        except Exception as error:  # whatever vLLM made of it: the test looks for the sentence
            answers = [{"error": f"{type(error).__name__}: {error}"}]
    else:  # vLLM does not start a second engine in one process
        answers = []
        for job in jobs:
            own = [place.with_suffix(".job"), place.with_suffix(".answer")]
            own[0].write_text(json.dumps([job]))
            subprocess.run([sys.executable, __file__, *own], check=True)
            answers += json.loads(own[1].read_text())
    place.write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
