"""Trains the model that ships with esparse, and its tokenizer, on the standard library's own text.

    python experiments/train_tiny.py --minutes 90

Learning rate: 200 warm-up steps, constant, and over the last quarter of the time a straight line to zero. What comes
out stands in esparse/assets/tiny with a note (TRAINING.json) of how it was made; `--steps` and `--decay-from` of that
note repeat the same run without a clock. Text, split and order of the batches depend on the seed and on the Python
version alone: the texts are those of the running Python's library, of which the built-in corpus is a small part.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch
import transformers
from standard_library import documents
from tokenizers import ByteLevelBPETokenizer
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HOME = Path(__file__).parent.parent / "esparse" / "assets" / "tiny"
END = "<|end|>"


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; `<|end|>` (id 0) stands between documents."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END)


def joined(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All documents as one stream of token ids, `<|end|>` in front of each."""
    ids = tokenizer([END + text for text in texts], add_special_tokens=False)["input_ids"]
    return torch.tensor([token for document in ids for token in document], dtype=torch.long)


@torch.inference_mode()
def held_out_loss(model: torch.nn.Module, stream: torch.Tensor, length: int, windows: int) -> float:
    """Mean negative log-likelihood per predicted token (nats) on the first `windows` windows."""
    model.eval()
    windows = min(windows, len(stream) // length)
    total = 0.0
    for ids in stream[: windows * length].view(-1, length).split(32):
        logits = model(ids, use_cache=False).logits.float()
        total += cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    model.train()
    return total / (windows * (length - 1))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--minutes", type=float, default=60.0, help="of training; ignored where --steps is given")
    arguments.add_argument("--steps", type=int, help="train exactly so many steps")
    arguments.add_argument("--decay-from", type=int, help="the step at which the learning rate begins to fall")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--vocabulary", type=int, default=1024)
    arguments.add_argument("--hidden", type=int, default=192)
    arguments.add_argument("--intermediate", type=int, default=768)
    arguments.add_argument("--blocks", type=int, default=4)
    arguments.add_argument("--heads", type=int, default=6)
    arguments.add_argument("--kv-heads", type=int, default=2)
    arguments.add_argument("--length", type=int, default=256, help="tokens of one training sequence")
    arguments.add_argument("--batch", type=int, default=16, help="sequences of one step")
    arguments.add_argument("--lr", type=float, default=3e-3)
    arguments.add_argument("--out", type=Path, default=HOME)
    arguments.add_argument("--eager", action="store_true", help="no torch.compile")
    asked = arguments.parse_args()

    torch.manual_seed(asked.seed)
    train_texts, held_out_texts = documents("train"), documents("held-out")
    tokenizer = train_tokenizer(train_texts, asked.vocabulary)
    stream, held_out = joined(tokenizer, train_texts), joined(tokenizer, held_out_texts)
    bytes_per_token = sum(len(text.encode()) for text in held_out_texts) / len(held_out)
    print(
        f"{len(stream):,} training tokens, {len(held_out):,} held out, {bytes_per_token:.3f} bytes a token", flush=True
    )

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=asked.vocabulary,
            hidden_size=asked.hidden,
            intermediate_size=asked.intermediate,
            num_hidden_layers=asked.blocks,
            num_attention_heads=asked.heads,
            num_key_value_heads=asked.kv_heads,
            max_position_embeddings=asked.length,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
        )
    )
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters", flush=True)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=asked.lr, betas=(0.9, 0.95), fused=True)
    network = model if asked.eager else torch.compile(model)

    start = time.monotonic()
    steps, decay_from = asked.steps, asked.decay_from
    if steps is not None and decay_from is None:
        decay_from = round(0.75 * steps)
    step = 0
    smooth = math.nan
    while steps is None or step < steps:
        minutes = (time.monotonic() - start) / 60
        if steps is None and minutes >= 0.75 * asked.minutes:
            decay_from, steps = step, math.ceil(step / 0.75)
        fade = 1.0 if steps is None or step < decay_from else (steps - step) / (steps - decay_from)
        for group in optimizer.param_groups:
            group["lr"] = asked.lr * min(1.0, (step + 1) / 200) * fade
        offsets = torch.randint(len(stream) - asked.length, (asked.batch, 1))
        ids = stream[offsets + torch.arange(asked.length)]
        logits = network(ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        smooth = loss.item() if math.isnan(smooth) else 0.99 * smooth + 0.01 * loss.item()
        step += 1
        if step % 500 == 0:
            nats = held_out_loss(model, held_out, asked.length, 128)
            rate = step * asked.batch * asked.length / (time.monotonic() - start)
            print(
                f"step {step} {minutes:.1f} min {rate:.0f} tokens/s train {smooth:.4f} held-out {nats:.4f} "
                f"perplexity {math.exp(nats):.3f}",
                flush=True,
            )

    nats = held_out_loss(model, held_out, asked.length, 10**9)
    note = {
        "what": "LLaMA-architecture model trained by experiments/train_tiny.py on the Python standard library's text",
        "command": f"python experiments/train_tiny.py --steps {steps} --decay-from {decay_from}",
        "settings": {k: v for k, v in vars(asked).items() if k not in ("out", "minutes")}
        | {"steps": steps, "decay_from": decay_from},
        "parameters": parameters,
        "training_tokens_seen": step * asked.batch * asked.length,
        "corpus_tokens": len(stream),
        "minutes": round((time.monotonic() - start) / 60, 1),
        "held_out": {
            "perplexity_per_token": round(math.exp(nats), 4),
            "bits_per_byte": round(nats / math.log(2) / bytes_per_token, 4),
            "tokens": len(held_out),
        },
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "processor": f"{platform.machine()}, {torch.get_num_threads()} threads",
        },
        "date": time.strftime("%Y-%m-%d"),
    }
    asked.out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(asked.out)
    tokenizer.save_pretrained(asked.out)
    (asked.out / "TRAINING.json").write_text(json.dumps(note, indent=1) + "\n")
    print(json.dumps(note, indent=1))


if __name__ == "__main__":
    main()
