"""Whether a record that an earlier call left is of the run that is asked for now."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from esparse.records import sources
from esparse.records.report import identity

log = logging.getLogger("esparse")


def differs(record: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """Why a finished run is not the one that is asked for, though it has the same id; None if it is.

    Such a run is refused, not repeated: its record is a valid measurement, which only its owner may give up.
    """
    config = record.get("config")
    if config is not None and identity(config) != identity(json.loads(json.dumps(settings))):
        return (
            f"but that is another run ({record.get('name')}) whose id is the same by chance: use another output_root, "
            "or rerun=true to replace it"
        )
    recorded = record.get("sources") or {}  # older records have none
    if differ := sources.changed(recorded, settings):
        more = f" and {len(differ) - 1} more" if len(differ) > 1 else ""
        return (
            f"but not on what is there now ({differ[0]}{more}): rerun=true replaces its record, another output_root "
            "keeps both"
        )
    if gone := sorted(set(recorded) - set(sources.files_of(settings))):
        log.info("%s: what it names is not there any more and could not be compared", ", ".join(gone))
    return None
