"""A small GGUF model as a few plain files, for a machine without internet and without the gguf package.

Its blocks are kept exactly as the file has them (4 or 8 bits, and the scales in half precision), under the names and in
the order of rows that transformers gives them, so that reading them back takes numpy alone and is exact.

    python experiments/carry_model.py pack MODEL.gguf HF_FOLDER OUT --parts 2   # needs gguf; OUT/part0, ...
    python experiments/carry_model.py unpack OUT HF_FOLDER   # a float32 checkpoint
    python experiments/carry_model.py same HF_FOLDER OTHER   # whether all weights are equal bit by bit

Shapes: B blocks of 32 weights, O outputs, I inputs.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np

BLOCK = 32  # weights that share a scale
BYTES = {"Q4_1": 20, "Q8_0": 34, "F32": 4 * BLOCK}  # of one block


def values(kind: str, data: np.ndarray) -> np.ndarray:
    """The weights (float32, B x 32) of blocks (uint8, B x bytes), as llama.cpp defines its types."""
    if kind == "F32":
        return np.ascontiguousarray(data).view(np.float32)
    scale_B1 = np.ascontiguousarray(data[:, :2]).view(np.float16).astype(np.float32)
    if kind == "Q8_0":
        return scale_B1 * data[:, 2:].view(np.int8).astype(np.float32)
    least_B1 = np.ascontiguousarray(data[:, 2:4]).view(np.float16).astype(np.float32)
    codes = data[:, 4:]  # the low halves of 16 bytes are the first 16 weights
    return scale_B1 * np.concatenate([codes & 15, codes >> 4], axis=1).astype(np.float32) + least_B1


def unpack(source: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    index = json.loads((source / "index.json").read_text())
    data = np.concatenate([np.fromfile(source / name, dtype=np.uint8) for name in index["parts"]])
    tensors, start = {}, 0
    for name, (kind, shape) in index["tensors"].items():
        count = int(np.prod(shape)) // BLOCK
        blocks = data[start : start + count * BYTES[kind]].reshape(count, BYTES[kind])
        tensors[name] = torch.from_numpy(values(kind, blocks).reshape(shape))
        start += blocks.size
    assert start == len(data), f"{start} bytes are named, {len(data)} are there"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source / "config.json", folder)
    print(f"{folder}: {len(tensors)} tensors, {len(data):,} bytes unpacked")


def pack(file: Path, hf: Path, out: Path, *, parts: int) -> None:
    """Finds each tensor of the checkpoint in the file, rows in its order, and cuts the bytes into parts."""
    from gguf import GGUFReader  # type: ignore[import-not-found]
    from safetensors.numpy import load_file

    config = json.loads((hf / "config.json").read_text())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights, index, found = load_file(hf / "model.safetensors"), {}, []
    for tensor in GGUFReader(str(file)).tensors:
        name, kind = _name(tensor.name), tensor.tensor_type.name
        shape = [int(size) for size in reversed(tensor.shape)]
        rows = np.ascontiguousarray(tensor.data).view(np.uint8).reshape(shape[0], -1)
        if (part := tensor.name.split(".")[2:3]) and part[0] in heads:
            # llama.cpp turns pairs of neighbours, transformers the two halves of a head.
            rows = rows.reshape(heads[part[0]], -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        blocks = np.ascontiguousarray(rows).reshape(-1, BYTES[kind])
        same = np.array_equal(values(kind, blocks).reshape(shape).view(np.uint32), weights[name].view(np.uint32))
        assert same, f"{tensor.name} is not {name} of {hf}"
        index[name] = (kind, shape)
        found.append(blocks.ravel())
    missing = weights.keys() - index.keys() - {"lm_head.weight"}
    assert not missing, f"the file lacks {sorted(missing)[:3]}"
    data = np.concatenate(found)
    out.mkdir(parents=True, exist_ok=True)
    names = [f"part{number}" for number in range(parts)]
    for name, piece in zip(names, np.array_split(data, parts), strict=True):
        piece.tofile(out / name)
        print(f"{out / name}: {piece.size / 2**20:.1f} MiB")
    (out / "index.json").write_text(json.dumps({"parts": names, "tensors": index}))
    shutil.copy(hf / "config.json", out)


def _name(gguf: str) -> str:
    if gguf in (ends := {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}):
        return ends[gguf]
    _, block, part, _ = gguf.split(".")
    places = {
        **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
        **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
        "attn_output": "self_attn.o_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    return f"model.layers.{block}.{places[part]}.weight"


def same(one: Path, other: Path) -> None:
    from safetensors.numpy import load_file

    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys(), sorted(first.keys() ^ second.keys())[:4]
    for name, value in first.items():
        assert np.array_equal(value.view(np.uint32), second[name].view(np.uint32)), name
    print(f"{len(first)} tensors are equal bit by bit")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["pack", source, folder, out, "--parts", parts]:
            pack(Path(source), Path(folder), Path(out), parts=int(parts))
        case ["unpack", source, folder]:
            unpack(Path(source), Path(folder))
        case ["same", one, other]:
            same(Path(one), Path(other))
        case asked:
            print(__doc__)
            sys.exit(0 if asked in (["-h"], ["--help"]) else 2)
