"""Searches cuSPARSELt's fastest algorithm for a product, once, and stores it on disk.

The library's algorithm numbers change with its version, so the key of an entry is (GPU, library version, dtype, m, n,
k). An algorithm may be wrong, hang, or end the process with an illegal instruction (all three were reported), so a
child process searches. It announces each trial, and checks every result against the float64 product. If an algorithm
ends the child, another child goes on without it.

    python -m esparse.bench.search        the child: a JSON list of cases on stdin, a JSON line for each event on stdout
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from esparse.bench.products import KERNELS, TOLERANCE, Case, error, pruned, random_input, random_weight
from esparse.bench.products import reference as product_in_double
from esparse.bench.timing import CudaClock, rotation
from esparse.kernels.linear import Algorithm, padded_tokens
from esparse.patterns import NM
from esparse.records.report import read_json, write_json

SPLITS = ((1, -1), (2, 1), (2, 2), (4, 1), (4, 2), (-1, -1))  # (split_k, split_k_mode); -1 is segment-K
ATTEMPTS = 4  # most children that may end during one case

Child = Callable[[list[dict[str, Any]]], Generator[dict[str, Any]]]


@dataclass(slots=True)
class Algorithms:
    """The cache of found algorithms; a damaged file counts as empty."""

    path: Path
    gpu: str
    library: str

    @classmethod
    def of(cls, device: torch.device, path: Path) -> Algorithms:
        """The cache for a GPU and the loaded library."""
        return cls(path, torch.cuda.get_device_name(device), library_version())

    def _entries(self) -> dict[str, Any]:
        return read_json(self.path)

    def key(self, case: Case) -> str:
        """The key of a case, with tokens padded as for the library."""
        tokens = padded_tokens(case.tokens, case.type)
        return f"{self.gpu} | cuSPARSELt {self.library} | {case.dtype} | {tokens} x {case.rows} x {case.inputs}"

    def get(self, case: Case) -> Algorithm | None:
        entry = self._entries().get(self.key(case))
        return Algorithm(**entry["algorithm"]) if entry and entry.get("algorithm") else None

    def known(self, case: Case) -> bool:
        return self.key(case) in self._entries()

    def put(self, case: Case, found: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Reads the file again, because another run may have written to it.
        write_json(self.path, self._entries() | {self.key(case): found})

    def search(self, cases: Sequence[Case], child: Child | None = None) -> None:
        """Searches every unknown case; also stores that no algorithm is right."""
        missing = [case for case in {self.key(case): case for case in cases}.values() if not self.known(case)]
        banned: dict[Case, list[Algorithm]] = {case: [] for case in missing}
        while missing:
            tried: tuple[Case, Algorithm] | None = None
            asked = [_as_dict(case) | {"banned": [a._asdict() for a in banned[case]]} for case in missing]
            with contextlib.closing((child or run_child)(asked)) as events:
                for event in events:
                    case = missing[event["case"]] if event["case"] < len(missing) else missing[0]
                    if "trying" in event:
                        tried = case, Algorithm(**event["trying"])
                    else:
                        ended = [a._asdict() for a in banned[case]]
                        self.put(case, event["found"] | {"ended_the_process": ended})
                        tried = None
            left = [case for case in missing if not self.known(case)]
            if tried is None and len(left) == len(missing):
                return  # the child cannot start on this machine
            if tried is not None:
                case, algorithm = tried
                banned[case].append(algorithm)
                if len(banned[case]) >= ATTEMPTS:
                    found = {"algorithm": None, "why": f"{ATTEMPTS} algorithms ended the process"}
                    self.put(case, found | {"ended_the_process": [a._asdict() for a in banned[case]]})
            missing = [case for case in left if not self.known(case)]


def _as_dict(case: Case) -> dict[str, Any]:
    return {"tokens": case.tokens, "rows": case.rows, "inputs": case.inputs, "dtype": case.dtype}


def run_child(cases: list[dict[str, Any]], quiet_s: float = 60.0) -> Generator[dict[str, Any]]:
    """The events of a child process, which is ended after `quiet_s` seconds without an event."""
    command = [sys.executable, "-m", "esparse.bench.search"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(cases))
        process.stdin.close()
        try:
            while True:
                timer = threading.Timer(quiet_s, process.kill)
                timer.start()
                line = process.stdout.readline()
                timer.cancel()
                if not line:
                    return
                with contextlib.suppress(json.JSONDecodeError):  # a library printed something
                    event = json.loads(line)
                    if isinstance(event, dict) and "case" in event:
                        yield event
        finally:
            process.kill()


def library_version() -> str:
    """The version of the loaded cuSPARSELt; PyTorch knows only the one that it was compiled with."""
    try:
        loaded = re.search(r"\S*libcusparseLt\S*", Path("/proc/self/maps").read_text())
        assert loaded is not None
        library = ctypes.CDLL(loaded.group())
        parts = []
        for which in range(3):  # libraryPropertyType: major, minor, patch
            value = ctypes.c_int()
            library.cusparseLtGetProperty(which, ctypes.byref(value))
            parts.append(str(value.value))
        return ".".join(parts)
    except (OSError, AttributeError, AssertionError):
        return f"compiled with {torch.backends.cusparselt.version()}"


# --- the child ---


def find(case: Case, banned: Sequence[Algorithm], tell: Callable[[Algorithm], None]) -> dict[str, Any]:
    """Tries all algorithms on the GPU: {algorithm (None: none is right), ms, default_ms, tried, refused, wrong}."""
    device = torch.device("cuda")
    clock, kernel = CudaClock(device), KERNELS["cusparselt"]
    weight_RI = pruned(random_weight(case.rows, case.inputs, case.dtype, device), case.nm)
    inputs = [random_input(case.tokens, case.inputs, case.dtype, device, seed) for seed in (1, 2)]
    prepared = kernel.prepare(weight_RI, case)
    copies = rotation(prepared.weight_bytes + case.bytes_of_activations, clock, most_bytes=1 << 30)
    others = [kernel.prepare(weight_RI, case) for _ in range(copies - 1)]
    expected = [_expected(weight_RI, x_TI) for x_TI in inputs]
    times: dict[Algorithm, float] = {}
    wrong, refused = [], 0
    for alg_id in range(_algorithms(prepared.parts["blob"], inputs[0], case)):
        for split_k, mode in SPLITS:
            algorithm = Algorithm(alg_id, split_k, mode)
            # Segment-K plans hang on GPUs with compute capability below 9.0.
            if algorithm in banned or (split_k == -1 and torch.cuda.get_device_capability() < (9, 0)):
                continue
            tell(algorithm)
            try:
                results = [kernel.call(prepared, x_TI, case, algorithm) for x_TI in (*inputs, inputs[0])]
                torch.cuda.synchronize()
            except RuntimeError:  # this algorithm does not take this split, or there is no such algorithm
                refused += 1
                continue
            worst = max(error(_ends(y), e) for y, e in zip(results, (*expected, expected[0]), strict=True))
            same = torch.equal(results[0], results[2]) and bool(torch.isfinite(results[0]).all())
            if worst > TOLERANCE[case.dtype] or not same:
                wrong.append(algorithm._asdict())
                continue
            del results
            times[algorithm] = _quick_ms(
                [partial(kernel.call, p, inputs[0], case, algorithm) for p in (prepared, *others)], clock
            )
    found: dict[str, Any] = {"algorithm": None, "tried": len(times), "refused": refused, "wrong": wrong}
    if not times:
        return found | {"why": "no algorithm gave the right result"}
    best = min(times, key=lambda algorithm: times[algorithm])
    default = times.get(Algorithm())
    return found | {"algorithm": best._asdict(), "ms": times[best], "default_ms": default}


def _expected(weight_RI: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
    return product_in_double(weight_RI, _ends(x_TI))


def _ends(of_tokens: torch.Tensor) -> torch.Tensor:
    """The first and the last tokens; comparing all of many would take longer than the search."""
    return of_tokens if len(of_tokens) <= 512 else torch.cat([of_tokens[:256], of_tokens[-256:]])


def _algorithms(blob: torch.Tensor, x_TI: torch.Tensor, case: Case) -> int:
    """The number of algorithms for this product, by the library's own search; 32 if that fails."""
    padded = x_TI.new_zeros(padded_tokens(case.tokens, case.type), case.inputs)
    out = {"int8": torch.int32, "float8_e4m3fn": torch.bfloat16}.get(case.dtype)
    try:
        return int(torch._C._cusparselt.mm_search(blob, padded.t(), None, None, out, True)[3])  # type: ignore[attr-defined]
    except (RuntimeError, AttributeError, TypeError, IndexError):
        return 32


def _quick_ms(calls: Sequence[Callable[[], object]], clock: CudaClock) -> float:
    def through() -> None:
        for call in calls:
            call()

    through()
    run = clock.graphed(through) or through
    run()
    return sorted(clock.milliseconds(run) for _ in range(3))[1] / len(calls)


def main() -> None:
    def say(event: dict[str, Any]) -> None:
        print(json.dumps(event), flush=True)

    for index, asked in enumerate(json.load(sys.stdin)):
        banned = [Algorithm(**algorithm) for algorithm in asked.pop("banned")]
        case = Case(**asked, nm=NM(2, 4))

        def tell(algorithm: Algorithm, index: int = index) -> None:
            say({"case": index, "trying": algorithm._asdict()})

        say({"case": index, "found": find(case, banned, tell)})


if __name__ == "__main__":
    main()
