"""The result of an evaluation as a table and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from missrec_t4r.config.checks import refuse_unknown
from missrec_t4r.pages.charts import bars

_STYLE = (
    "<style>.missrec svg{width:380px;margin:4px}.missrec .bar{fill:#3b6ea5}.missrec .grid{stroke:#8886}"
    ".missrec text{font:12px sans-serif;fill:currentColor}</style>"
)
METRICS = ("recall@10", "ndcg@10", "recall@50", "ndcg@50")


class Evaluation:
    """What `missrec_t4r.commands.evaluate` returned; a table in a notebook.

    Attributes
    ----------
    report : dict
        Everything, as in the JSON file of ``missrec evaluate``.
    """

    def __init__(self, report: Mapping[str, Any]) -> None:
        self.report = dict(report)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per protocol and system, one column per metric."""
        rows = [
            {"protocol": protocol, "system": system, **{name: values.get(name) for name in METRICS}}
            for protocol, systems in self.report["protocols"].items()
            for system, values in systems.items()
        ]
        return pd.DataFrame(rows).set_index(["protocol", "system"])

    def slices(self, metric: str = "ndcg@10", protocol: str = "excluded") -> pd.DataFrame:
        """Return a metric on parts of the sessions: a row per slice, its number of sessions ``n``, a column per system.

        Slices are cold and rare targets, targets without a modality, short and long sessions
        (`missrec_t4r.evaluation.slices`); they overlap.

        Raises
        ------
        ConfigError
            An unknown metric or protocol.
        """
        self._require_metric(metric)
        refuse_unknown([protocol], list(self.report["protocols"]), "protocol ")
        rows = {
            name: {"n": part["n"], **{system: values.get(metric) for system, values in part.get(protocol, {}).items()}}
            for name, part in self.report["slices"].items()
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("slice")

    def plot(self, metric: str = "ndcg@10", *, slices: Sequence[str] | str = ()) -> Chart:
        """Return bar charts of a metric, one per protocol and one bar per system; drawn by a notebook.

        Parameters
        ----------
        metric : str
        slices : str or sequence of str
            In place of protocols: one chart per slice, items of the session excluded.

        Raises
        ------
        ConfigError
            An unknown metric or slice.
        """
        self._require_metric(metric)
        title, systems_by_panel = f"{self.report['n_users']:,} users of {self.report['split']}", {}
        for protocol, systems in self.report["protocols"].items():
            systems_by_panel[protocol.replace("_", " ")] = systems
        if slices:
            title, systems_by_panel = f"{metric} by slice of {self.report['split']}", {}
            for name in [slices] if isinstance(slices, str) else slices:
                refuse_unknown([name], list(self.report["slices"]), "slice ")
                part = self.report["slices"][name]
                systems_by_panel[f"{name} (n={part['n']})"] = part.get("excluded", {})
        panels = [
            bars(
                list(systems), [values.get(metric) or 0.0 for values in systems.values()], x_title=name, y_title=metric
            )
            for name, systems in systems_by_panel.items()
        ]
        return Chart(title, panels)

    def _require_metric(self, metric: str) -> None:
        measured = (values for systems in self.report["protocols"].values() for values in systems.values())
        refuse_unknown([metric], list(dict.fromkeys(name for values in measured for name in values)), "metric ")

    def _repr_html_(self) -> str:
        return str(self.to_frame().style.format("{:.4f}", na_rep="-").to_html())

    def __repr__(self) -> str:
        """Return the table as text."""
        return str(self.to_frame().round(4))


class Chart:
    """Charts beside each other, as HTML with SVG: a notebook shows them, `save` writes them to a file."""

    def __init__(self, title: str, panels: Sequence[str]) -> None:
        self.title, self.panels = title, list(panels)

    def __repr__(self) -> str:
        """Return the title."""
        return f"Chart({self.title!r})"

    def _repr_html_(self) -> str:
        return f'{_STYLE}<div class="missrec"><p>{escape(self.title)}</p>{"".join(self.panels)}</div>'

    def save(self, file: str | Path) -> None:
        """Write a page of its own."""
        page = f"<!doctype html><meta charset='utf-8'><title>{escape(self.title)}</title>{self._repr_html_()}"
        Path(file).write_text(page, encoding="utf-8")
