"""The result of an evaluation as a table and a plot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

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
        import pandas as pd

        rows = [
            {"protocol": protocol, "system": system, **{name: values.get(name) for name in METRICS}}
            for protocol, systems in self.report["protocols"].items()
            for system, values in systems.items()
        ]
        return pd.DataFrame(rows).set_index(["protocol", "system"])

    def plot(self, metric: str = "ndcg@10") -> Any:
        """Draw the systems' values of a metric with their 95 % intervals; return matplotlib's axes.

        Raises
        ------
        ImportError
            matplotlib is not installed.
        """
        import matplotlib.pyplot as plt

        protocols = self.report["protocols"]
        figure, axes = plt.subplots(
            1, len(protocols), figsize=(4 * len(protocols), 3), sharey=True, layout="constrained"
        )
        panels = list(getattr(axes, "flat", [axes]))
        for axis, (protocol, systems) in zip(panels, protocols.items(), strict=True):
            names = list(systems)
            values = [systems[name][metric] or 0.0 for name in names]
            intervals = [
                systems[name]["interval"].get(metric) or (value, value)
                for name, value in zip(names, values, strict=True)
            ]
            errors = [[max(v - low, 0.0) for v, (low, _) in zip(values, intervals, strict=True)]]
            errors.append([max(high - v, 0.0) for v, (_, high) in zip(values, intervals, strict=True)])
            axis.barh(names, values, xerr=errors, color=["#3b6ea5"] + ["#b8c4d0"] * (len(names) - 1))
            axis.set_title(protocol.replace("_", " "))
            axis.set_xlabel(metric)
        panels[0].invert_yaxis()
        figure.suptitle(f"{self.report['n_users']:,} users of {self.report['split']}")
        return axes

    def _repr_html_(self) -> str:
        return str(self.to_frame().style.format("{:.4f}", na_rep="-").to_html())

    def __repr__(self) -> str:
        """Return the table as text."""
        return str(self.to_frame().round(4))
