"""One run of ``missrec etl``: its input and settings, checked before anything is read, and its report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from missrec_t4r.config.checks import require_choices
from missrec_t4r.config.option_names import option
from missrec_t4r.errors import ConfigError, SchemaError
from missrec_t4r.etl import item_table
from missrec_t4r.etl.event_settings import EventSettings, parse_seconds, parse_time, parse_time_features, parse_weights
from missrec_t4r.etl.installed import require_nvtabular
from missrec_t4r.etl.outputs import REPORT_FILE
from missrec_t4r.etl.quality import checks
from missrec_t4r.etl.sources.table import expand
from missrec_t4r.io.json_files import write_json
from missrec_t4r.schema import ITEM_ID, TIMESTAMP, USER_ID

if TYPE_CHECKING:
    from missrec_t4r.etl.nvt.workflow_file import WorkflowFile

ENGINES = ("auto", "memory", "disk", "gpu")
_CHOICES = {"split": ("leave_one_out", "time"), "unknown_items": ("append", "drop"), "engine": ENGINES}


@dataclass(kw_only=True)
class Run:
    """Events and settings of one run, or of one update."""

    files: Sequence[Path]
    names: dict[str, str]
    """Input column -> ``user_id``, ``item_id`` or ``timestamp``."""
    settings: dict[str, Any]
    """As ``etl.json`` holds them; the run completes them."""
    modality_files: Mapping[str, Path]
    findings: checks.Findings = field(default_factory=checks.Findings)
    """Gains the data-quality findings."""
    started: float = field(default_factory=time.perf_counter)

    @property
    def derive(self) -> EventSettings:
        """Return the derived event columns."""
        return EventSettings.of(self.settings)

    def set_features(self, features: Sequence[str], texts: Sequence[str]) -> None:
        """Note the event columns that become list features, after checking what depends on them.

        Parameters
        ----------
        features, texts : sequence of str
            All, and those of them that hold text.

        Raises
        ------
        SchemaError
            A column that the settings name is not among them, or a derived one's name is taken.
        """
        self.derive.check(features, texts)
        if missing := [name for name in self.settings["categorical_columns"] if name not in features]:
            raise SchemaError(f"categorical columns {missing} are not event columns", f"some of {list(features)}")
        self.settings["event_features"] = list(features)

    def write_report(self, counts: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Write ``etl.json`` and return its content."""
        report = counts | {"findings": self.findings.to_list(), "settings": self.settings, "format": 1}
        report["seconds"] = round(time.perf_counter() - self.started, 3)
        write_json(folder / REPORT_FILE, report)
        return report


@dataclass(kw_only=True)
class Task(Run):
    """Input and settings of one run of ``missrec etl`` on all events, for every engine."""

    items: Path
    workflow: WorkflowFile | None


_AS_GIVEN = (
    *("split", "valid_from", "test_from", "k_core", "min_item_count", "unknown_items", "drop_duplicates"),
    *("max_sequence_length", "max_events", "time_format", "event_type_column", "save_nvtabular_workflow"),
)


def make_task(options: Mapping[str, Any]) -> Task:
    """Return the run that has these options of `missrec_t4r.etl.pipeline.etl`.

    Raises
    ------
    ConfigError, DataError
        Options contradict each other or need what is not installed, or there is no such file.
    """
    if options["delta"]:
        raise ConfigError("--delta without --update", "both", "add --update")
    if options["items"] is None:
        raise ConfigError("no item table", "--items items.parquet", "only --update goes without")
    times = {name: parse_time(options[name], option(name)) for name in ("valid_from", "test_from")}
    options = {**options, **times}
    _check_settings(options)
    derived = {
        "session_gap": parse_seconds(options["session_gap"], "--session-gap"),
        "event_weights": parse_weights(options["event_weights"]),
        "time_features": parse_time_features(options["time_features"]),
    }
    if options["engine"] == "memory":
        require_nvtabular("--engine memory", "leave it out")
    if options["save_nvtabular_workflow"]:
        require_nvtabular("--save-nvtabular-workflow", "leave it out")
    workflow = None if options["workflow"] is None else _read_workflow_file({**options, **derived})
    modality_files = item_table.modality_files(options["modality"], options["fingerprint"])
    names = {options["user_column"]: USER_ID, options["item_column"]: ITEM_ID, options["time_column"]: TIMESTAMP}
    if len(names) < 3:
        raise ConfigError(f"columns {list(names)} for user, item and time", "three different columns")
    settings = {name: options[name] for name in _AS_GIVEN} | {
        "columns": {name: column for column, name in names.items()},
        "catalogue_item_column": options["catalogue_item_column"] or options["item_column"],
        "drop_columns": list(options["drop_columns"]),
        "categorical_columns": list(options["categorical_columns"]),
        "fingerprints": dict(options["fingerprint"] or {}),
        **derived,
        "workflow": None if workflow is None else {"file": workflow.file.name, "sha256": workflow.sha256},
    }
    return Task(
        files=expand(options["interactions"], "interactions"),
        items=Path(options["items"]),
        names=names,
        settings=settings,
        modality_files=modality_files,
        workflow=workflow,
    )


def _check_settings(options: Mapping[str, Any]) -> None:
    require_choices(**{name: (options[name], choices) for name, choices in _CHOICES.items()})
    split, valid_from, test_from = (options[name] for name in ("split", "valid_from", "test_from"))
    if (valid_from is None) != (test_from is None):
        raise ConfigError(
            "only one boundary of the time split is set", "both or none", "set --valid-from and --test-from"
        )
    if valid_from is not None and split != "time":
        raise ConfigError("boundaries are set for a leave-one-out split", "--split time", "add it or leave them out")


def _read_workflow_file(options: Mapping[str, Any]) -> WorkflowFile:
    """Return the file of ``--workflow``.

    Raises
    ------
    ConfigError, DataError
        The file cannot be used, or is combined with an option that it replaces or with the out-of-core engine.
    """
    replaces = ("event_weights", "session_gap", "time_features", "max_events")
    if replaced := [option(name) for name in replaces if options[name]]:
        raise ConfigError(
            f"--workflow with {', '.join(replaced)}",
            "one or the other: these options change the built-in workflow",
            "write EventWeights, SessionGap, TimeFeatures or SessionSlice into the file",
        )
    if options["engine"] == "disk":
        raise ConfigError(
            "--workflow with --engine disk",
            "--engine memory or gpu: the out-of-core engine does not run NVTabular operators",
            "leave --engine out",
        )
    require_nvtabular("--workflow", "leave it out")
    from missrec_t4r.etl.nvt.workflow_file import WorkflowFile

    return WorkflowFile(options["workflow"])
