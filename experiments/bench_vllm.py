"""Measures vLLM on a CPU with packed weights against dense ones: speed, bytes, and what transformers says.

    export ESPARSE_VLLM_PYTHON=$(.ci/vllm_environment)
    python experiments/bench_vllm.py [--model NAME_OR_DIR] [--pattern 2:4] [--dtype bfloat16] [--turns 2]

A model is pruned with Wanda and without a shuffle, and written dense and packed: the same weights. Engines of vLLM
read them in turns, a process each: dense, packed, dense, packed. Each answers one request, then eight at once, then
eight long prompts. A ratio is of tokens per second, packed over dense: by the processor's time in one thread, since
other jobs may run beside it, and by the clock. Only ratios count. The tokens and log-probabilities of the short prompts
are compared with those of transformers on the same files: of the dense ones it says how far two programs are apart.
Cost: some minutes, and the disk space of the model twice.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from tests.vllm.beside import with_esparse  # noqa: E402

TOKENS = 32  # that follow each prompt
WORK = {  # what is asked: prompts, tokens of a prompt
    "warm-up": (1, 8),
    "1 request": (1, 8),
    "8 requests": (8, 8),
    "8 prompts of 190 tokens": (8, 190),
}
COMPARED = (1, 2)  # of them with transformers
KINDS = ("dense", "packed")


def exported(model_path: str, pattern: str, folder: Path) -> dict[str, Path]:
    """The pruned model, in both forms."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import esparse

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    report = esparse.prune(model, tokenizer, pattern, metric="wanda", shuffle=None, sequences=8, length=64)
    forms = {kind: folder / kind for kind in KINDS}
    for kind, place in forms.items():
        esparse.save(model, tokenizer, report, place, packed=kind == "packed")
    return forms


@torch.no_grad()
def differences(folder: Path, dtype: str, job: dict[str, Any], answer: dict[str, Any]) -> str:
    """Of vLLM's greedy choices from those of transformers, which reads the same files and the same tokens before."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    same, tokens, apart, below = 0, 0, 0.0, 0.0
    for number in COMPARED:
        served = answer["batches"][number]
        for prompt, chosen, logprobs in zip(job["batches"][number], served["tokens"], served["logprobs"], strict=True):
            logits_TV = model(torch.tensor([[*prompt, *chosen]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            said_TV = logits_TV.float().log_softmax(-1)
            said_T = said_TV.gather(1, torch.tensor(chosen)[:, None])[:, 0]
            same += int((said_TV.argmax(-1) == torch.tensor(chosen)).sum())
            tokens += len(chosen)
            apart = max(apart, float((torch.tensor(logprobs) - said_T).abs().max()))
            below = max(below, float((said_TV.max(-1).values - said_T).max()))
    return (
        f"{same} of {tokens} tokens are the first choice of transformers, the others at most {below:.4f} below it; "
        f"log-probabilities differ by at most {apart:.2g}"
    )


def asked(folder: Path, dtype: str) -> dict[str, Any]:
    drawn = torch.Generator().manual_seed(0)
    batches = [torch.randint(1, 1000, shape, generator=drawn).tolist() for shape in WORK.values()]
    engine = {"model": str(folder), "dtype": dtype, "enable_prefix_caching": False}
    return {"engine": engine, "batches": batches, "tokens": TOKENS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "esparse" / "assets" / "tiny"))
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--turns", type=int, default=2, help="engines of each kind")
    typed = parser.parse_args()
    python = os.environ.get("ESPARSE_VLLM_PYTHON")
    if python is None:
        sys.exit("ESPARSE_VLLM_PYTHON names no Python of an environment with vLLM: .ci/vllm_environment prints one")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        forms = exported(typed.model, typed.pattern, folder)
        (folder / "site").mkdir()
        jobs = [asked(forms[kind], typed.dtype) for kind in KINDS * typed.turns]
        (folder / "jobs.json").write_text(json.dumps(jobs))
        command = [python, ROOT / "tests/vllm/engine.py", folder / "jobs.json", folder / "answers.json"]
        done = subprocess.run(command, capture_output=True, text=True, env=with_esparse(python, folder / "site"))
        if done.returncode:
            sys.exit(done.stdout[-3000:] + done.stderr[-3000:])
        answers = json.loads((folder / "answers.json").read_text())
        for job, answer in zip(jobs, answers, strict=True):
            if "error" in answer:
                sys.exit(f"{job['engine']['model']}: {answer['error']}")
        told(typed, answers)
        for kind, job, answer in zip(KINDS, jobs, answers, strict=False):
            print(f"{kind}: {differences(forms[kind], typed.dtype, job, answer)}")
        stored = {kind: sum(file.stat().st_size for file in forms[kind].glob("*.safetensors")) for kind in KINDS}
        print(f"files, in float32: dense {stored['dense']:,}, packed {stored['packed']:,} bytes")


def told(typed: argparse.Namespace, answers: list[dict[str, Any]]) -> None:
    busy = f"{os.getloadavg()[0]:.0f} jobs on {os.cpu_count()} cores"
    print(f"{typed.model}, {typed.pattern}, {typed.dtype}, {TOKENS} tokens behind each prompt; {busy}")
    # Of a dense layer vLLM keeps a copy of its own on a CPU, which is no parameter and not counted by it.
    print(f"packed parameters in vLLM: {answers[1]['bytes']:,} bytes")
    for number, (name, (prompts, _)) in enumerate(WORK.items()):
        if name == "warm-up":
            continue
        for clock in ("processor_seconds", "seconds"):
            rates = [prompts * TOKENS / answer["batches"][number][clock] for answer in answers]
            ratios = ", ".join(f"{p / d:.2f}" for d, p in zip(rates[::2], rates[1::2], strict=True))
            dense, packed = ("/".join(f"{rate:.1f}" for rate in rates[first::2]) for first in (0, 1))
            print(f"{name}, by {clock}: dense {dense}, packed {packed} tokens per second: ratios {ratios}")


if __name__ == "__main__":
    main()
