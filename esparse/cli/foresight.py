"""What can be known of a run before torch is loaded: folders and files, devices, lengths, what a queue needs.

A mistake here ends a call in about a second, of a sweep once for all of its runs. What takes the model itself (the
contents of its files, its tokenizer, memory) is checked when it is loaded.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esparse.bench import NoBench
from esparse.cli.messages import sentence
from esparse.data.lengths import sequence_length
from esparse.data.text_files import Rows
from esparse.errors import Mistake
from esparse.export import ToFolder
from esparse.export.dense_checkpoint import Dense
from esparse.export.place import check_place, check_writable
from esparse.jobs.launchers import LAUNCHERS
from esparse.models import gguf_file
from esparse.models.layer_names import names_in_blocks
from esparse.models.load import ASSETS, BUILTIN, Model
from esparse.models.model_files import adapter, check_config_of, shards_of
from esparse.models.model_name import check_absent
from esparse.parts import expressions
from esparse.records.report import finished, run_id
from esparse.run.settings import Experiment

log = logging.getLogger("esparse")

KINDS = ("cuda", "mps", "xpu", "hpu", "npu", "xla", "mtia")  # of devices that PyTorch has a name for
# Of a GPU that PyTorch calls cuda: NVIDIA's driver, AMD's, WSL's, a Jetson's.
SIGNS = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/nvmap", "/dev/nvhost-gpu")
POSITIONS = ("max_position_embeddings", "n_positions")  # what nearly all configurations call the longest sequence
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def check(experiment: Experiment, settings: Mapping[str, Any], *, queued: bool = False) -> None:
    """Raises Mistake for what this run could not begin with; one that is finished, and not repeated, needs nothing.

    `queued`: it is carried out on another machine, whose devices are not known here, and whose files may be others:
    what is not found here is then said, and no mistake.
    """
    _check_devices(experiment, queued=queued or bool(experiment.dry_run))
    if not experiment.dry_run:
        _check_folder(Path(experiment.output_root).expanduser() / run_id(settings))
    try:
        _check_files(experiment, settings, dry=bool(experiment.dry_run))
    except (OSError, ValueError) as error:
        folder = Path(experiment.output_root) / run_id(settings)
        if not experiment.rerun and finished(folder) is not None:
            return
        if not queued:
            raise Mistake(sentence(error)) from None
        log.warning("on this machine, which may not be the node: %s", sentence(error))


def _check_folder(folder: Path) -> None:
    """Raises Mistake if something else is where the run's folder or its record would be, or the record is another's."""
    if folder.exists() and not folder.is_dir():
        raise Mistake(
            f"{folder} is a file, and the run's folder would have that name: move it away, or take another output_root"
        )
    for name in ("result.json", "owner.json", "status.json"):
        file = folder / name
        if file.is_dir():
            raise Mistake(f"{file} is a folder, and a file of the run has that name: move it away")
        if file.exists() and not os.access(file, os.R_OK):
            raise Mistake(
                f"{file} cannot be read by this user: ask its owner ({file.owner()}) for it, or take another "
                "output_root"
            )


def check_queue(launcher: Mapping[str, Any]) -> None:
    """Raises Mistake if sweeps cannot be submitted from here, or with these settings."""
    settings = {key: value for key, value in launcher.items() if key != "_target_"}
    for name, component in LAUNCHERS.items():
        if str(launcher.get("_target_")).endswith(f".{name.capitalize()}"):
            component(**settings)
    if is_slurm(launcher) and shutil.which("sbatch") is None:
        raise Mistake("there is no sbatch on this machine: submit from a login node, or use hydra/launcher=local")


def is_slurm(launcher: Mapping[str, Any]) -> bool:
    return str(launcher.get("_target_", "")).endswith(".Slurm")


def gpu_is_there() -> bool:
    """Whether this machine may have a GPU that PyTorch calls cuda; if it may, PyTorch itself says how many."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return False
    return shutil.which("nvidia-smi") is not None or any(Path(sign).exists() for sign in SIGNS)


def _cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_devices(experiment: Experiment, *, queued: bool) -> None:
    asked = experiment.model.devices
    kind, colon, number = asked.partition(":")
    is_number = number.isdecimal() and (int(number) > 0 or kind != "cpu")
    if not (asked == "auto" or (kind in ("cpu", *KINDS) and (not colon or is_number))):
        nearest = ": did you mean cuda?" if kind in ("gpu", "nvidia", "cude") else ""
        raise Mistake(
            f"model.devices must be auto, cpu, cuda or cuda:N, or cpu:N for N processes, got {asked!r}{nearest}"
        )
    if queued:
        return
    if kind == "cpu" and experiment.model.processes > max(2, cores := _cores()):
        raise Mistake(
            f"model.devices={asked} asks for {number} processes, each with libraries and hidden states of its own, and "
            f"this machine has {cores} CPU core{'s' * (cores > 1)} for them: ask for at most {max(2, cores)}"
        )
    has_gpu = gpu_is_there()
    if kind == "cuda" and not has_gpu:
        raise Mistake(
            f"model.devices={asked} asks for a GPU, and this machine has none that can be seen (nvidia-smi, /dev, "
            "CUDA_VISIBLE_DEVICES): use model.devices=auto or cpu"
        )
    if not isinstance(experiment.bench, NoBench) and (kind == "cpu" or not has_gpu):
        raise Mistake(
            f"bench={experiment.bench.option} times sparse kernels on a GPU, and this run computes on "
            "the cpu: use bench=none, or model.devices=cuda on a machine with one"
        )


def _check_files(experiment: Experiment, settings: Mapping[str, Any], *, dry: bool) -> None:
    """Raises OSError or ValueError for a file or folder that is not there, or not what it has to be."""
    _check_model(experiment.model, weights=not dry)
    _check_skips(experiment)
    _check_biases(experiment)
    texts: tuple[Any, ...] = (experiment.calibration, experiment.evaluate)
    for group, text in zip(("calibration", "evaluate"), texts, strict=True):
        if text.path is not None:
            Rows(Path(text.path), text.column, group, render=str if text.chat else None).check()
    longest = _longest(experiment.model)
    if longest is not None:
        for group, text in zip(("calibration", "evaluate"), texts, strict=True):
            sequence_length(text.length, longest, f"{group}.length")
    if dry:  # it writes nothing
        return
    root = Path(experiment.output_root)
    _check_root(root)
    if isinstance(experiment.export, ToFolder):
        check_place(experiment.export.place(root / run_id(settings)))


def _check_root(root: Path) -> None:
    nearest = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists() or path.is_symlink())
    check_writable(nearest, f"output_root={root}")


def _place(model: Model) -> Path:
    return BUILTIN if model.path == "builtin" else Path(model.path).expanduser()


def _check_model(model: Model, *, weights: bool) -> None:
    place = _place(model)
    if model.revision is not None and place.exists():
        raise Mistake(
            f"model.revision={model.revision} names a version on the hub, and model.path={model.path} is on this "
            "machine: leave model.revision out"
        )
    if place.is_dir():
        check_config_of(place)
        if weights:
            shards_of(place)
        return
    if place.is_file():
        if not gguf_file.is_named(place):
            raise Mistake(
                f"model.path: {model.path} is a file, and a model is a directory with a config.json or a file that "
                "ends in .gguf"
            )
        return
    check_absent(model.path, "model.path")
    if weights and any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in OFFLINE):
        _check_cached(model)


def _check_skips(experiment: Experiment) -> None:
    """Raises Mistake for layers to skip that are not among those of a local checkpoint."""
    asked = {"model.skip": experiment.model.skip, "recovery.skip": experiment.recovery.skips()}
    if not any(asked.values()) or (names := names_in_blocks(_place(experiment.model))) is None:
        return
    layers = [name.removesuffix(".weight") for name in names if ".weight" in name and "norm" not in name]
    for setting, skip in asked.items():
        expressions.check_found(setting, skip, names, ", ".join(layers[:2]))


def _check_biases(experiment: Experiment) -> None:
    """Raises Mistake for biases that an ordinary checkpoint of a local model has no place for in any layer."""
    if not (isinstance(experiment.export, Dense) and experiment.recovery.adds_biases()):
        return
    names = names_in_blocks(_place(experiment.model)) or []
    layers = [name.removesuffix(".weight") for name in names if name.endswith(".weight") and "norm" not in name]
    if layers and not any(f"{layer}.bias" in names for layer in layers):
        raise Mistake(
            f"the recovery gives biases to layers that have none ({layers[0]}, ...), and an ordinary checkpoint of "
            f"{experiment.model.path} has no place for them: use export=packed"
        )


def _check_cached(model: Model) -> None:
    """Raises ConnectionError for a hub model that is not on this machine, where the hub is not to be asked."""
    from huggingface_hub import try_to_load_from_cache

    def cached(name: str) -> str | None:
        found = try_to_load_from_cache(model.path, name, revision=model.revision)
        return found if isinstance(found, str) else None

    if cached("config.json") is None:
        if (other := cached("adapter_config.json")) is not None:
            raise Mistake(adapter(model.path, json.loads(Path(other).read_text())))
        raise ConnectionError(
            f"{model.path} is neither a local directory nor in reach on the Hugging Face hub (HF_HUB_OFFLINE is set, "
            "and it is not in the cache); copy the model here and name its directory: model=hf model.path=DIR"
        )


def _longest(model: Model) -> int | None:
    """The longest sequence that the configuration names; None if it is not here, or does not say."""
    config = _place(model) / "config.json"
    try:
        if config.is_file():
            written = json.loads(config.read_text(encoding="utf-8"))
        else:
            written = json.loads((ASSETS / "shapes.json").read_text(encoding="utf-8")).get(model.path, {})
        written = written.get("text_config") or written
        longest = next(
            (written[name] for name in POSITIONS if isinstance(written.get(name), int) and written[name] > 0),
            None,
        )
    except (ValueError, AttributeError, OSError):  # a damaged file: its reader says what is wrong with it
        return None
    return None if longest is None else int(longest)
