"""The data report: numbers worked out by hand, a page that loads nothing, drift, and the gate's exit code."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from missrec_t4r.cli import app
from missrec_t4r.errors import ConfigError, DataError, GateError
from missrec_t4r.etl.pipeline import etl
from missrec_t4r.etl.quality.report import apply_gate, drift, report
from missrec_t4r.pages.charts import bars, log_line
from tests.workflows.tables import EVENTS, ITEMS, save_vectors, write

DAY = 86_400
START = 1_600_000_000 // DAY * DAY
# Days on which the nine events fall; ann has four events, ben three, cem two.
DAYS = [0, 3, 0, 0, 1, 0, 3, 3, 0]


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    when = START + np.array(DAYS) * DAY + EVENTS["timestamp"]
    events = pd.concat([EVENTS.assign(timestamp=when)] + [EVENTS[:1].assign(timestamp=when[0])], ignore_index=True)
    vectors = save_vectors(tmp_path / "text.npy", [[1.0, 0], [0, 1], [0, 0], [1, 1]])
    etl(*write(tmp_path / "raw", events), tmp_path / "data", modality={"text": vectors}, drop_duplicates=True)
    return tmp_path


def test_times_with_fractions_and_in_other_units(tmp_path: Path) -> None:
    """Ten seconds apart is not the same time, as in a float32; milliseconds are no dates, and reported all the same."""
    for unit, days in ((1, 1), (1000, 2)):
        times = (START + 0.5 + EVENTS["timestamp"].rank(method="first") * 10) * unit
        etl(*write(tmp_path / "raw", EVENTS.assign(timestamp=times)), tmp_path / "data")
        said = report(tmp_path / "data", tmp_path / f"out-{unit}", now=START)
        measures = said["measures"]
        assert (measures["share_same_time_as_before"], measures["days"]) == (0.0, days)
        assert len(json.loads(Path(said["report"]).read_text())["distributions"]["events_per_day"]) == days


@pytest.mark.parametrize(
    ("content", "reason"),
    [("[]", "its content is of type list"), ("{}", "without distributions, made, measures"), ("{", "Expecting")],
)
def test_a_last_report_that_is_none_is_named(content: str, reason: str, shop: Path) -> None:
    (shop / "report.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"report.json is not a report \({reason}.*expected: report.json of"):
        report(shop / "data", shop / "out", previous=shop / "report.json")


def test_measures(shop: Path) -> None:
    said = report(shop / "data", shop / "out", now=START + 4 * DAY)["measures"]
    items = {"lamp": 3, "desk": 2, "sofa": 3, "vase": 1}
    expected = {
        "events": 9,
        "users": 3,
        "items": 4,
        "items_without_events": 0,
        "session_length_mean": 3.0,
        "session_length_median": 3.0,
        "session_length_max": 4,
        "share_short_sessions": 1 / 3,
        "share_top_1_percent_items": 3 / 9,
        "popularity_gini": (-3 * 1 - 2 + 3 + 3 * 3) / (4 * 9),
        "share_repeated_items": 1 / 9,  # ann's second sofa
        "coverage.text": 3 / 4,
        "coverage_of_events.text": (9 - items["sofa"]) / 9,
        "days": 4,
        "days_without_events": 1,
        "newest_age_days": 1 - 50 / DAY,
        "share_future": 0.0,
        "last_day_vs_median": 3 / 2,  # 5, 1, 0, 3 events
        "share.duplicate_events": 1 / 9,
    }
    assert {name: said[name] for name in expected} == pytest.approx(expected, abs=1e-3)
    later = report(shop / "data", shop / "old", now=START + DAY)["measures"]
    assert later["share_future"] == pytest.approx(3 / 9, abs=1e-6)


def test_a_measure_on_its_bound_passes_the_gate() -> None:
    measures = {"events": 5, "users": 2}
    passed = [
        check["passed"]
        for bounds in ({"min": 5}, {"max": 5}, {"min": 5, "max": 5}, {"min": 6}, {"max": 4})
        for check in apply_gate(measures, {"events": bounds})
    ]
    assert passed == [True, True, True, False, False]


def test_items_outside_both_lists_of_popular_ones_drift_too() -> None:
    measures = dict.fromkeys(("events", "users", "items", "session_length_mean"), 10)
    runs = [
        {"measures": measures, "distributions": {"popular": popular, "session_lengths": {"1": 1}}}
        for popular in ({"lamp": 0.6}, {"lamp": 0.2})
    ]
    found = drift(measures, runs[1]["distributions"], runs[0])
    assert found["drift.popularity"] == pytest.approx(0.4)  # 0.4 of the events moved to items that neither list names
    assert found["drift.new_popular"] == 0


@pytest.mark.parametrize("delta", [False, True])
def test_the_gate_of_an_update_is_about_the_new_events(tmp_path: Path, delta: bool) -> None:
    """One of the night's four events lacks its item and one is there twice; repeated events of before do not count."""
    etl(*write(tmp_path / "raw", pd.concat([EVENTS, EVENTS])), tmp_path / "data", engine="disk", workers=1)
    night = EVENTS[["user_id", "item_id", "event_type", "dwell"]][:4].assign(timestamp=[60, 61, 62, 62])
    night.assign(item_id=["lamp", None, "desk", "desk"], user_id="ann").to_parquet(tmp_path / "night.parquet")
    (tmp_path / "data" / "train" / "._part_00000.parquet").write_bytes(b"what macOS keeps of a file")
    etl(tmp_path / "night.parquet", None, tmp_path / "data", update=True, delta=delta, workers=1)
    measures = report(tmp_path / "data", tmp_path / "out")["measures"]
    assert (measures["share.null_item_id"], measures["share.duplicate_events"]) == (0.25, 0.25)


@pytest.mark.parametrize("delta", [False, True])
def test_what_the_gate_refused_is_not_accepted_with_the_next_night(tmp_path: Path, delta: bool) -> None:
    """Two of three events of the second night are repeated; the third night's four are refused with them."""
    data, out, gate = tmp_path / "data", tmp_path / "out", tmp_path / "gate.yaml"
    gate.write_text("share.duplicate_events: {max: 0.1}")
    etl(*write(tmp_path / "raw", EVENTS), data, engine="disk", workers=1)
    nights = [[60], [70, 70, 70], [80, 81, 82, 83], [90]]

    def night(number: int) -> float:
        times = nights[number]
        table = EVENTS[["event_type", "dwell"]][: len(times)].assign(user_id="ann", item_id="desk", timestamp=times)
        table.to_parquet(tmp_path / f"night{number}.parquet")
        etl(tmp_path / f"night{number}.parquet", None, data, update=True, delta=delta, workers=1)
        return float(report(data, out, gate=gate)["measures"].get("share.duplicate_events", 0.0))

    assert night(0) == 0
    with pytest.raises(GateError, match=r"share.duplicate_events is 0.666667"):
        night(1)
    for _ in range(2):  # the same for the repeated command
        with pytest.raises(GateError, match=r"share.duplicate_events is 0.285714"):  # 2 of 3 + 4
            night(2)
    assert report(data, out)["measures"]["share.duplicate_events"] == pytest.approx(
        2 / 7, abs=1e-6
    )  # accepted as it is
    assert night(3) == 0


def test_a_share_is_that_of_the_worst_column(tmp_path: Path) -> None:
    """A later column with fewer nulls does not hide an earlier one."""
    events = EVENTS.assign(first=[1.0, *[None] * 8], second=[None, *[1.0] * 8])
    etl(*write(tmp_path / "raw", events), tmp_path / "data")
    assert report(tmp_path / "data", tmp_path / "out")["measures"]["share.null_feature"] == pytest.approx(
        8 / 9, abs=1e-5
    )


def test_positions_are_no_clock(tmp_path: Path) -> None:
    etl(*write(tmp_path / "raw"), tmp_path / "data")
    said = report(tmp_path / "data", tmp_path / "out")
    assert "days" not in said["measures"]
    assert "positions in place of times" in Path(said["page"]).read_text()


def test_several_sessions_of_a_user_all_count(tmp_path: Path) -> None:
    twice = pd.concat([EVENTS, EVENTS.assign(timestamp=EVENTS["timestamp"] + 10_000)], ignore_index=True)
    etl(*write(tmp_path / "raw", twice), tmp_path / "data", session_gap="1h")
    measures = report(tmp_path / "data", tmp_path / "out")["measures"]
    assert (measures["events"], measures["users"], measures["sessions"]) == (18, 3, 6)
    assert measures["share_repeated_items"] == pytest.approx(2 / 18, abs=1e-6)


class _Page(HTMLParser):
    """Collects tags and attributes, and complains about tags that are not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [f"{tag} {name}" for name, _ in attrs]
        if tag not in ("meta", "line", "rect", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "rect", "polyline"):
            assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(shop: Path) -> None:
    etl(*write(shop / "raw2", EVENTS, ITEMS.assign(item_id=["<b>lamp", "desk", "sofa", "vase"])), shop / "<i>data")
    text = Path(report(shop / "<i>data", shop / "out")["page"]).read_text()
    parsed = _Page()
    parsed.feed(text)
    assert parsed.open == []
    loading = {"src", "href", "srcset", "data", "action", "poster"}
    assert not [name for name in parsed.attributes if name.split()[1] in loading]
    assert not re.search(r"url\(|@import|https?:|<script", text)
    assert "<i>data" not in text
    assert "&lt;i&gt;data" in text
    charts = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text)]
    assert len(charts) == 2  # no days: these times are positions


def test_charts_draw_to_scale() -> None:
    chart = ElementTree.fromstring(bars(["a", "b & c"], [10, 5], x_title="x", y_title="y"))
    heights = [float(bar.attrib["height"]) for bar in chart.iter("rect")]
    assert heights[0] == pytest.approx(2 * heights[1], abs=0.1)
    assert [title.text for title in chart.iter("title")] == ["a: 10", "b & c: 5"]
    line = next(ElementTree.fromstring(log_line([1, 10, 100], [100, 10, 1], x_title="x", y_title="y")).iter("polyline"))
    points = np.array([point.split(",") for point in line.attrib["points"].split()], float)
    np.testing.assert_allclose(points[1], (points[0] + points[2]) / 2, atol=0.1)  # straight on both logarithms


@pytest.mark.parametrize("labels", [["short", "b"], [f"a long name {n:02}" for n in range(13)]])
def test_every_bar_has_its_name_below_and_none_overlaps_another(labels: list[str]) -> None:
    chart = ElementTree.fromstring(bars(labels, [1.0] * len(labels), x_title="system", y_title="y"))
    below = [text for text in chart.iter("text") if text.attrib["text-anchor"] == "middle" and text.text in labels]
    assert [text.text for text in below] == labels
    by_row: dict[str, list[float]] = {}
    for text in below:
        by_row.setdefault(text.attrib["y"], []).append(float(text.attrib["x"]))
    widest = 7 * max(map(len, labels))  # letters of 11 pixels are narrower
    assert all((np.diff(row) > widest).all() for row in by_row.values())
    title = next(text for text in chart.iter("text") if text.text == "system")
    assert max(map(float, by_row)) + 12 < float(title.attrib["y"]) < float(chart.attrib["viewBox"].split()[3])


def test_a_scale_of_many_bars_is_labelled_here_and_there() -> None:
    chart = ElementTree.fromstring(bars([str(n) for n in range(300)], [1.0] * 300, x_title="x", y_title="y"))
    assert 10 < len([text for text in chart.iter("text") if text.attrib["text-anchor"] == "middle"]) < 50


def test_a_broken_gate_ends_with_code_3_and_is_no_basis_of_comparison(shop: Path) -> None:
    gate = shop / "gate.yaml"
    gate.write_text("events: {min: 5}\nshare.duplicate_events: {max: 0.05}\ndrift.popularity: {max: 0.5}\n")
    command = ["report", "--data", str(shop / "data"), "--out", str(shop / "out"), "--gate", str(gate)]
    ran = CliRunner().invoke(app, command)
    assert ran.exit_code == 3
    said = json.loads(ran.stdout.splitlines()[-1])
    assert said["passed"] is False
    assert [line["passed"] for line in said["gate"]] == [True, False, True]
    assert "share.duplicate_events is 0.111111, bounds {'max': 0.05}" in " ".join(ran.output.split())
    assert sorted(file.name for file in (shop / "out").iterdir()) == ["refused.html", "refused.json"]

    gate.write_text("share.duplicate_events: {max: 0.2}\nshare.null_item_id: {max: 0}\n")
    assert CliRunner().invoke(app, command).exit_code == 0
    gate.write_text("drift.events: {min: -0.1, max: 0.1}\n")
    fewer = EVENTS[EVENTS["user_id"] != "cem"]
    etl(*write(shop / "raw", fewer.assign(timestamp=START)), shop / "data")
    with pytest.raises(GateError, match=r"drift.events is -0.222222") as refused:
        report(shop / "data", shop / "out", gate=gate)
    measures = refused.value.result["measures"]
    # lamp 3/9 -> 2/7, desk 2/9 -> 2/7, sofa 3/9 -> 3/7, vase 1/9 -> 0
    moved = (abs(3 / 9 - 2 / 7) + abs(2 / 9 - 2 / 7) + abs(3 / 9 - 3 / 7) + 1 / 9) / 2
    assert measures["drift.popularity"] == pytest.approx(moved, abs=1e-5)
    assert measures["drift.session_lengths"] == pytest.approx(
        1 / 3, abs=1e-5
    )  # of three sessions the short one is gone


def test_a_dry_run_names_no_page_as_if_it_were_there(shop: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    said = report(shop / "data", shop / "out", dry_run=True)
    page = shop / "out" / "report.html"
    assert f"would write {page}: 9 events, 0 bounds, 0 violated" in caplog.text
    assert (said["would_write"], "page" in said) == ([str(page.with_suffix(".json")), str(page)], False)
    (shop / "gate.yaml").write_text("events: {min: 50}")
    with pytest.raises(GateError, match="run without --dry-run and look at .*refused.html"):
        report(shop / "data", shop / "out", gate=shop / "gate.yaml", dry_run=True)
    assert not (shop / "out").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("event: {min: 1}", r"bounds 'event', which is not measured .* a measure such as events"),
        ("share.nul_item_id: {max: 0}", r"bounds 'share.nul_item_id', .* a measure such as share.null_item_id"),
        ("qqq: {min: 1}", "bounds 'qqq', .* a measure such as events, sessions, users, items"),
        ("events: 5", "sets 5 for events"),
        ("events: {least: 5}", "sets {'least': 5} for events"),
        ("- events", "for the file"),
        ("events: {min: 1", "cannot be read"),
    ],
)
def test_a_wrong_gate_is_named(content: str, words: str, shop: Path) -> None:
    (shop / "gate.yaml").write_text(content)
    with pytest.raises(ConfigError, match=words):
        report(shop / "data", shop / "out", gate=shop / "gate.yaml")
    with pytest.raises(DataError, match="holds no etl.json"):
        report(shop / "raw", shop / "out")


def test_drift_may_be_required() -> None:
    assert apply_gate({}, {"drift.popularity": {"max": 1}})[0]["passed"]
    assert not apply_gate({}, {"drift.popularity": {"max": 1, "required": True}})[0]["passed"]
