"""A packed checkpoint in a real vLLM computes what transformers computes from the same files."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from esparse.packed.checksums import checksum
from tests.vllm.conftest import Ask, Pack

pytestmark = pytest.mark.vllm
TOKENS = 16
SEEDED = torch.Generator().manual_seed(0)
SHARED = torch.randint(1, 1000, (100,), generator=SEEDED).tolist()
# Several lengths at once, one of them in two pieces of the prefill; then two with a beginning that is known by then.
BATCHES = [
    [[317], [993, 922, 12, 268, 642, 316], torch.randint(1, 1000, (130,), generator=SEEDED).tolist()],
    [[*SHARED, 5]],
    [[*SHARED, 7, 8]],
]
ENGINE = {"enable_prefix_caching": True, "block_size": 32, "max_num_batched_tokens": 64}


def job(folder: Path, dtype: str, batches: list[list[list[int]]] = BATCHES, **engine: Any) -> dict[str, Any]:
    return {"engine": ENGINE | {"model": str(folder), "dtype": dtype} | engine, "batches": batches, "tokens": TOKENS}


@pytest.mark.parametrize(
    ("pattern", "shuffle", "dtype"),
    [
        ("2:4", "esparse", "float32"),
        ("2:4", None, "bfloat16"),
        ("8:16", "esparse", "bfloat16"),
        ("8:16", None, "float32"),
    ],
    ids=str,
)
def test_greedy_tokens_and_their_probabilities_are_those_of_transformers(
    pattern: str, shuffle: str | None, dtype: str, pack: Pack, ask: Ask
) -> None:
    [answer], _ = ask(job(pack(pattern, shuffle), dtype))
    assert "error" not in answer, answer
    model = AutoModelForCausalLM.from_pretrained(pack(pattern, shuffle), dtype=getattr(torch, dtype)).eval()
    for prompts, served in zip(BATCHES, answer["batches"], strict=True):
        for prompt, tokens, logprobs in zip(prompts, served["tokens"], served["logprobs"], strict=True):
            logits_TV = greedy(model, prompt, tokens)
            expected_TV = logits_TV.float().log_softmax(-1)
            said_T = expected_TV.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            if dtype == "float32":
                assert expected_TV.argmax(-1).tolist() == tokens
                torch.testing.assert_close(torch.tensor(logprobs), said_T, rtol=0, atol=1e-3)
            else:  # logits of 8 to 16 are rounded to 0.06: another token may be as good as the best, up to that
                step = 2.0 ** (int(logits_TV.abs().max().log2()) - 7)
                assert bool((expected_TV.max(-1).values - said_T <= 2 * step).all())
                torch.testing.assert_close(torch.tensor(logprobs), said_T, rtol=0, atol=2.4 * step)
    assert [served["cached"] for served in answer["batches"]] == [[0, 0, 0], [0], [96]]


@torch.no_grad()
def greedy(model: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """What transformers would have chosen from at each of these tokens."""
    return model(torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0, len(prompt) - 1 : -1]


def test_weights_take_the_bytes_that_the_packed_form_has(pack: Pack, ask: Ask) -> None:
    [answer], _ = ask(job(pack("2:4", "esparse"), "bfloat16", BATCHES[:1]))
    model = AutoModelForCausalLM.from_pretrained(pack("2:4", "esparse"), dtype=torch.bfloat16)
    packed = sum(p.nbytes for p in (*model.parameters(), *model.buffers()) if p.dtype != torch.float32)
    orders = sum(b.nbytes for name, b in model.named_buffers() if name.endswith("_order"))
    # vLLM keeps an order beside each layer; transformers' are of the norms.
    assert packed - orders <= answer["bytes"] <= packed + 3 * orders


def two_ranks(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A job for two processes that share each layer, and the variable that gives them a core each."""
    cores = sorted(os.sched_getaffinity(0))
    engine = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    return job(folder, "float32", BATCHES[:1], **engine), {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}


def test_two_ranks_share_the_rows_and_columns_of_a_layer(pack: Pack, ask: Ask) -> None:
    folder = pack("2:4", "foldable")
    asked, bound = two_ranks(folder)
    [answer], said = ask(asked, **bound)
    assert "error" not in answer, said[-3000:]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    [served] = answer["batches"]
    for prompt, tokens, logprobs in zip(BATCHES[0], served["tokens"], served["logprobs"], strict=True):
        expected_TV = greedy(model, prompt, tokens).log_softmax(-1)
        assert expected_TV.argmax(-1).tolist() == tokens
        torch.testing.assert_close(torch.tensor(logprobs), expected_TV.max(-1).values, rtol=0, atol=1e-3)


def test_a_shuffle_that_reaches_across_ranks_is_refused_in_one_sentence(pack: Pack, ask: Ask) -> None:
    asked, bound = two_ranks(pack("2:4", "esparse"))
    [answer], said = ask(asked, **bound)
    assert "reaches across ranks: use tensor_parallel_size=1, or prune with shuffle.foldable=true" in said, answer


def damaged(folder: Path, how: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    entry, [first, *_] = config["quantization_config"], sorted(folder.glob("*.safetensors"))
    if how not in ("cut", "gone"):
        del entry["digest"]  # of other changes it would say nothing but that there are some
    if how == "cut":
        first.write_bytes(first.read_bytes()[:-100])
    elif how == "gone":
        first.unlink()
    elif how == "mixed":
        entry["layers"]["model.layers.0.self_attn.k_proj"] = "8:16"
    elif how == "experts":
        entry["experts"] = {"model.layers.0.mlp.experts": {}}
    elif how == "grid":
        entry["grid"] = {"class": "Integer"}
    elif how == "version":
        entry["version"] = 99
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("cut", "is damaged or cut short"),
        ("gone", "is missing: copy the folder again"),
        ("mixed", "computes model.layers.0.self_attn.qkv_proj as one layer, and its parts differ"),
        ("experts", "cannot serve packed experts"),
        ("grid", "cannot serve packed codes"),
        ("version", "version 99 of esparse's format"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_sentence(
    how: str, sentence: str, pack: Pack, ask: Ask, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(pack("2:4", "esparse"), folder)
    damaged(folder, how)
    [answer], said = ask(job(folder, "float32", BATCHES[:1]))
    assert sentence in answer["error"] or sentence in said, answer


def test_an_index_that_no_writer_made_is_refused_with_its_layer(pack: Pack, ask: Ask, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "damaged"
    shutil.copytree(pack("2:4", "esparse"), folder)
    [shard] = folder.glob("model-00002-of-*.safetensors")
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("up_proj.index"))
    save_file(tensors | {name: torch.full_like(tensors[name], 255)}, shard, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["files"][shard.name] = checksum(shard)
    del config["quantization_config"]["digest"]
    (folder / "config.json").write_text(json.dumps(config))
    [answer], said = ask(job(folder, "float32", BATCHES[:1]))
    sentence = f"the packed layer {name.removesuffix('.index')} cannot be read"
    assert sentence in answer["error"] or sentence in said, answer


def test_vllm_serve_answers_as_openai_does(
    pack: Pack, vllm_python: str, environment: dict[str, str], tmp_path: Path
) -> None:
    """Without a flag for the format, with torch.compile as vLLM has it by itself, in processes of its own."""
    folder, port = pack("2:4", "esparse"), free_port()
    command = [str(Path(vllm_python).with_name("vllm")), "serve", folder, "--dtype", "float32", "--port", str(port)]
    command += ["--max-model-len", "256", "--max-num-seqs", "8", "--served-model-name", "small"]
    own = environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=own, start_new_session=True)
        try:
            until = time.monotonic() + 900
            while not answers(port):
                assert server.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()[-3000:]
                time.sleep(1)
            prompt = BATCHES[0][1]
            asked = {"model": "small", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 1}
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions",
                json.dumps(asked | {"ignore_eos": True}).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=600) as response:
                [choice] = json.loads(response.read())["choices"]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, 15)
            server.wait(60)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        asked_ids = torch.tensor([prompt])
        made = model.generate(asked_ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
        expected_TV = model(made, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    said = torch.tensor(choice["logprobs"]["token_logprobs"])
    torch.testing.assert_close(said, expected_TV.max(-1).values, rtol=0, atol=1e-3)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
