"""JSON files of earlier versions are read under today's keys."""

from __future__ import annotations

import json
from pathlib import Path

from missrec_t4r.io.key_names import read_with_current_keys, with_current_keys

EARLIER_RUN = Path(__file__).parents[1] / "earlier_version" / "files" / "run" / "run.json"


def test_a_run_of_an_earlier_version_has_the_settings_of_its_terms_by_name() -> None:
    info, stored = read_with_current_keys(EARLIER_RUN), json.loads(EARLIER_RUN.read_text())
    assert set(info) == set(stored) - {"prior", "side_features"} | {"score_terms", "event_features"}
    assert info["event_features"] == stored["side_features"]
    terms, before = info["score_terms"], stored["prior"]
    assert terms["item_knn"] == {name: before[name] for name in ("weight", "decay", "power", "window", "directed")}
    assert terms["content_knn"] == before["lookalikes"]
    assert terms["cold_start"]["threshold"] == before["newcomers"]["bar"]
    assert terms["cold_start"]["bias"] == before["newcomers"]["level"]
    assert terms["valid_ndcg@10_without_terms"] == before["without"]
    assert set(terms) == {"item_knn", "content_knn", "cold_start", "valid_ndcg@10", "valid_ndcg@10_without_terms"}


def test_a_run_without_tuned_terms_has_none() -> None:
    assert with_current_keys({"prior": {}}) == {"score_terms": {}}
    assert with_current_keys({"prior": {"newcomers": {}}}) == {"score_terms": {"cold_start": {}}}


def test_a_warm_start_of_an_earlier_version_has_a_weight_loading_report() -> None:
    info = with_current_keys({"start": {"kind": "continue", "run": "../earlier"}, "without": ["ema_decay"]})
    assert info == {"weight_loading": {"kind": "warm_start", "run": "../earlier"}, "ignored_settings": ["ema_decay"]}


def test_a_data_report_of_an_earlier_version_is_compared_with() -> None:
    assert with_current_keys({"made_from": "4f", "shown": {}}) == {"data_digest": "4f", "distributions": {}}


def test_keys_of_today_stay_as_they_are() -> None:
    info = with_current_keys(read_with_current_keys(EARLIER_RUN))
    assert info == read_with_current_keys(EARLIER_RUN)
