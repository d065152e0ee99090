"""Sends a run's numbers to Weights & Biases in addition to its record. The only file that imports wandb.

W&B is a reader of the record, never the only copy: a failure here is logged in one sentence, and the run goes on.
wandb-core writes to disk about twice a minute, so a killed process loses its last half minute of `log` calls.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from esparse.errors import Mistake
from esparse.run import tracked_values

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger("esparse")

MODES = ("offline", "online", "disabled")
ALSO = {"": "offline", "dryrun": "offline", "run": "online"}  # what WANDB_MODE may say, too
ARTIFACTS = ("masks", "checkpoint")  # what may be uploaded
MASKS = ("masks.safetensors", "orders.safetensors")
NO_KEY = "there is no API key: run `wandb login` or set WANDB_API_KEY"


class Sink:
    """Receives the numbers of one run; this one keeps nothing.

    `logged`: blocks of the run's earlier attempts that it has already.
    """

    logged = 0

    def log(self, values: dict[str, Any]) -> None:
        """Adds one step to the run's history, e.g. one pruned block."""

    def finish(self, record: dict[str, Any]) -> None:
        """Takes the values of the finished run's record."""


@dataclass(kw_only=True, slots=True)
class Tracking(ABC):
    """Base class of trackers, which get the numbers of a run while it runs."""

    @abstractmethod
    def in_sweep(self, name: str) -> None:
        """The run is one of this sweep's."""

    def needs_export(self) -> bool:
        """Whether it wants the checkpoint that an export writes."""
        return False

    def told_again(self, record: dict[str, Any], folder: Path) -> None:  # noqa: B027
        """A run that is finished was asked for again, and is read from its record."""

    @abstractmethod
    def run(self, *, run_id: str, name: str, config: dict[str, Any], folder: Path) -> AbstractContextManager[Sink]:
        """A sink that is open inside the `with`; leaving by an exception marks the run as failed."""


@dataclass(kw_only=True, slots=True)
class NoTracking(Tracking):
    """Tracks nothing."""

    def in_sweep(self, name: str) -> None:
        pass

    @contextmanager
    def run(self, *, run_id: str, name: str, config: dict[str, Any], folder: Path) -> Iterator[Sink]:
        yield Sink()


@dataclass(kw_only=True, slots=True)
class Wandb(Tracking):
    """Weights & Biases, with its files under `folder`/wandb.

    The W&B run has the id of the esparse run, so a job that was stopped goes on in the same one; one that an agent of a
    W&B sweep started has the id that the agent gave it. Online without a server or a key goes on offline. Raises
    ValueError for a setting that W&B would refuse.
    """

    # W&B's other variables are followed too (`WANDB_NAME`, `WANDB_DIR`, ...), but for `WANDB_RUN_ID`
    mode: str  # offline | online (goes on offline if the server cannot be reached) | disabled
    project: str  # W&B project
    entity: str | None  # user or team that owns it; None: the account's default
    group: str | None  # a common name for several runs; None: in a sweep its folder's
    tags: list[str]  # of the W&B run; none: those of `WANDB_TAGS`
    # A checkpoint is not copied, so that it has to stay in its place until it is uploaded
    artifacts: list[str]  # what is uploaded: masks (with channel orders), checkpoint (what `export` wrote)
    # Online a checkpoint has to get through in them, else the command that uploads the rest is said
    timeout_s: float  # seconds that a W&B server may take at the start and at the end

    def __post_init__(self) -> None:
        self.mode = ALSO.get(self.mode, self.mode)
        if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes"):
            self.mode = "disabled"
        if self.mode not in MODES:
            raise Mistake(f"tracking.mode (or WANDB_MODE) must be one of {', '.join(MODES)}, got {self.mode!r}")
        if not 0 < len(self.project) <= 128 or set(self.project) & set("/\\#?%:"):
            raise Mistake(f"tracking.project must have 1 to 128 characters, none of / \\ # ? % :, got {self.project!r}")
        if wrong := [tag for tag in self.tags if not 0 < len(tag) <= 64]:
            raise Mistake(f"each of tracking.tags must have 1 to 64 characters, got {wrong[0]!r}")
        if wrong := [kind for kind in self.artifacts if kind not in ARTIFACTS]:
            raise Mistake(f"each of tracking.artifacts must be one of {', '.join(ARTIFACTS)}, got {wrong[0]!r}")
        if not self.timeout_s > 0:
            raise Mistake(f"tracking.timeout_s must be more than 0 seconds, got {self.timeout_s}")

    def in_sweep(self, name: str) -> None:
        self.group = self.group or name

    def needs_export(self) -> bool:
        return "checkpoint" in self.artifacts

    @contextmanager
    def run(self, *, run_id: str, name: str, config: dict[str, Any], folder: Path) -> Iterator[Sink]:
        if self.mode == "disabled":
            logger.info("W&B is disabled (tracking.mode, WANDB_MODE or WANDB_DISABLED)")
        run = None if self.mode == "disabled" else self._start(run_id, name, config, folder.resolve())
        if run is None:
            yield Sink()
            return
        sink, exit_code = _WandbSink(run, self, folder), 1
        try:
            yield sink
            exit_code = 0
        except (SystemExit, KeyboardInterrupt):  # the signal of a job that comes back; W&B then waits for it
            sink.preempted()
            raise
        finally:
            # Always, so that the next job of a sweep in the same process gets a run of its own.
            sink.close(exit_code)

    def _start(self, run_id: str, name: str, config: dict[str, Any], folder: Path) -> wandb.Run | None:
        run_id = self._id(run_id)
        # W&B's reports about its own errors hold up the exit for 20 s behind a firewall that drops packets.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        asked: dict[str, Any] = {
            "id": run_id,
            "name": os.environ.get("WANDB_NAME") or name,
            "config": tracked_values.flat(json.loads(json.dumps(config, default=str))),
            "dir": str(wandb_folder(folder)),
        }
        try:
            Path(asked["dir"]).mkdir(parents=True, exist_ok=True)
            return self._online(asked) if self.mode == "online" else self._init("offline", asked)
        except Exception as error:
            logger.warning("W&B could not be started (%s); the run goes on without it.", _sentence(error))
            return None

    def _id(self, run_id: str) -> str:
        """The id of the W&B run: an agent's, where its sweep waits for a run by that name, else the esparse run's."""
        given = os.environ.get("WANDB_RUN_ID", run_id)
        if given == run_id or os.environ.get("WANDB_SWEEP_ID"):
            return given
        logger.warning("WANDB_RUN_ID is not followed: the W&B run has the id of the esparse run, %s", run_id)
        return run_id

    def told_again(self, record: dict[str, Any], folder: Path) -> None:
        """To the agent of a W&B sweep, which waits for the numbers of what it asked for."""
        if not os.environ.get("WANDB_SWEEP_ID"):
            return
        with self.run(run_id=record["id"], name=record["name"], config=record["config"], folder=folder) as sink:
            sink.finish(record)

    def _online(self, asked: dict[str, Any]) -> wandb.Run:
        """The run on the server, or on disk when the server cannot be had."""
        attempts = f"run-*-{asked['id']}"
        before = set(_runs(asked["dir"], attempts))
        try:
            return self._init("online", asked)
        except Exception as error:
            why = _sentence(error)
        _teardown()  # wandb-core still holds the id of the attempt
        for attempt in set(_runs(asked["dir"], attempts)) - before:
            shutil.rmtree(attempt, ignore_errors=True)  # holds nothing, and `wandb sync` would upload it
        run = self._init("offline", asked)
        logger.warning(
            "W&B could not be reached (%s); the run goes on offline, to upload it later: %s",
            why,
            _sync_command(run),
        )
        return run

    def _init(self, mode: Literal["offline", "online"], asked: dict[str, Any]) -> wandb.Run:
        import wandb

        wandb.setup(wandb.Settings(silent=True, mode=mode))
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            raise ConnectionError(NO_KEY)  # wandb.init would ask the terminal for one, and wait
        settings = wandb.Settings(
            silent=True,
            console="off",
            reinit="create_new",
            init_timeout=self.timeout_s,
            finish_timeout=self.timeout_s,
            finish_timeout_raises=True,
        )
        where: dict[str, Any] = {"resume": "allow"} if mode == "online" else {}  # offline every attempt has its files
        if not os.environ.get("WANDB_SWEEP_ID"):  # whose runs belong to its project, under the agent's id
            where |= {"project": self.project, "entity": self.entity}
        return wandb.init(
            mode=mode,
            **where,
            settings=settings,
            group=self.group,
            tags=list(self.tags) or None,  # W&B then takes those of WANDB_TAGS
            **asked,
        )


class _WandbSink(Sink):
    """Passes everything on to one wandb run; the first failure is said, none is raised."""

    def __init__(self, run: wandb.Run, settings: Wandb, folder: Path) -> None:
        self._run, self._settings, self._folder = run, settings, folder
        self._warned = False
        self.logged = run.step  # of a run that goes on: what the server has
        for name in tracked_values.MEASURED.values():
            run.define_metric(f"{name}/*", step_metric="block", summary="none")

    def preempted(self) -> None:
        try:
            self._run.mark_preempting()
        except Exception as error:
            self._warn(error)

    def log(self, values: dict[str, Any]) -> None:
        try:
            self._run.log(values)
        except Exception as error:
            self._warn(error)

    def finish(self, record: dict[str, Any]) -> None:
        """Scalars go to the summary by the names of tracked_values.py, lists of rows become tables.

        Perplexities and means stand in the history, too: a W&B sweep looks there. The configuration is there already.
        """
        try:
            scalars, tables = tracked_values.parts(record)
            outcome = tracked_values.outcome(record)
            with _staged_in(self._run.settings.sync_dir):
                shown = {path: _table(rows) for path, rows in tables.items()} | _charts(record.get("layers") or [])
                if outcome | shown:
                    self._run.log(outcome | shown)
            self._run.summary.update(scalars | outcome)
            if "masks" in self._settings.artifacts:
                self._upload_masks()
            if "checkpoint" in self._settings.artifacts:
                self._upload_checkpoint(record["export"])
        except Exception as error:
            self._warn(error)

    def _upload_masks(self) -> None:
        import wandb

        artifact = wandb.Artifact(f"masks-{self._run.id}", type="masks")
        with _staged_in(self._run.settings.sync_dir):
            for file in (self._folder / name for name in MASKS):
                if file.exists():
                    artifact.add_file(str(file))
            self._run.log_artifact(artifact)

    def _upload_checkpoint(self, export: dict[str, Any]) -> None:
        """From where it lies, until then: W&B would keep a copy of it, and one more in its cache."""
        import wandb

        artifact = wandb.Artifact(f"checkpoint-{self._run.id}", type="model", metadata=export)
        place = Path(export["path"]).resolve()
        for file in sorted(path for path in place.rglob("*") if path.is_file()):
            name = file.relative_to(place).as_posix()
            artifact.add_file(str(file), name=name, policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact)

    def close(self, exit_code: int) -> None:
        """Ends the wandb run; 0 = finished, else failed."""
        run = self._run
        try:
            run.finish(exit_code=exit_code)
            if run.offline:
                self._drop_earlier()
                in_sweep = self._settings.group is not None  # which says it once for all
                level = logging.DEBUG if in_sweep else logging.INFO
                logger.log(level, "to upload this run to W&B: %s", _sync_command(run))
            elif run.url:
                logger.info("W&B: %s", run.url)
        except TimeoutError:
            logger.warning(
                "W&B did not take the whole run within %g s; to upload the rest: %s",
                self._settings.timeout_s,
                _sync_command(run),
            )
        except Exception as error:
            self._warn(error)
            _teardown()  # the next run starts its own wandb-core

    def _drop_earlier(self) -> None:
        """Removes what earlier attempts left on disk: this one has their history too, and W&B would upload it twice."""
        own = Path(self._run.settings.sync_dir).resolve()
        for earlier in offline_runs(self._folder, self._run.id):
            if earlier.resolve() != own:
                shutil.rmtree(earlier, ignore_errors=True)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            logger.warning("W&B failed (%s); the run and its record go on.", _sentence(error))
        self._warned = True


def wandb_folder(folder: Path) -> Path:
    """The folder for W&B's files of a run: beside the record, or WANDB_DIR."""
    given = os.environ.get("WANDB_DIR")
    return Path(given).expanduser().absolute() if given else folder


def offline_runs(folder: Path, run_id: str) -> list[Path]:
    """What `wandb sync` uploads of the run in this folder, oldest first."""
    return _runs(str(wandb_folder(folder)), f"offline-run-*-{run_id}")


def _runs(place: str, pattern: str) -> list[Path]:
    """W&B hides its folder (.wandb) if that is there already."""
    return sorted(path for hidden in ("wandb", ".wandb") for path in (Path(place) / hidden).glob(pattern))


def _table(rows: list[dict[str, Any]]) -> wandb.Table:
    import wandb

    columns = list(dict.fromkeys(key for row in rows for key in row))
    data = [[_cell(row.get(column)) for column in columns] for row in rows]
    return wandb.Table(columns=columns, data=data, allow_mixed_types=True)


def _charts(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """A chart per measurement over the blocks, a line per kind of layer."""
    import wandb

    charts = {}
    for field, name in tracked_values.MEASURED.items():
        xs, ys, kinds = tracked_values.series(layers, field)
        if kinds:
            title = f"{name.replace('_', ' ')} by block"
            charts[f"{name}_by_block"] = wandb.plot.line_series(xs, ys, keys=kinds, title=title, xname="block")
    return charts


def _cell(value: Any) -> Any:
    return "x".join(map(str, value)) if isinstance(value, list | tuple) else value  # shapes: 64x128


@contextmanager
def _staged_in(folder: str) -> Iterator[None]:
    """Lets W&B put its copies of a table beside the run, not into the home directory, unless told where."""
    if "WANDB_DATA_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = folder
    try:
        yield
    finally:
        del os.environ["WANDB_DATA_DIR"]


def _sync_command(run: wandb.Run) -> str:
    return f"wandb sync {shlex.quote(str(run.settings.sync_dir))}"


def _teardown() -> None:
    import wandb

    try:
        wandb.teardown()
    except Exception as error:  # wandb-core may have died before
        logger.debug("W&B teardown: %r", error)


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
