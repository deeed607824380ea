"""A union of data folders: ids by domain, modalities by fingerprint, sessions on the union's rows."""

from pathlib import Path

import numpy as np
import pytest

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.data.union import load_domains, match_modalities, named_folders
from missrec_t4r.errors import ConfigError, DataError, ModalityError
from tests.pretraining.conftest import TEXT_WIDTH, angles, modality, write_shop


def test_items_of_two_domains_share_one_catalogue(shops: dict[str, Path]) -> None:
    domains = load_domains({name: shops[name] for name in ("books", "toys")})
    union = domains.catalogue
    assert union.ids_of([3, 16, 17, 26]) == ["books-B0", "books-B13", "toys-0", "toys-9"]
    assert np.bincount(domains.domain + 1).tolist() == [3, 14, 10]
    books, toys = (Catalogue.load(shops[name] / "catalogue") for name in ("books", "toys"))
    assert union.train_count[3:].tolist() == [*books.train_count[3:], *toys.train_count[3:]]
    own = Sessions.load(shops["toys"] / "train")
    joint = domains.splits["train"]
    assert len(joint) == 80
    assert [union.ids_of(joint[40 + i]) for i in (0, 7)] == [
        [f"toys-{item}" for item in toys.ids_of(own[i])] for i in (0, 7)
    ]


def test_modalities_are_matched_by_fingerprint_and_a_domain_may_lack_one(shops: dict[str, Path]) -> None:
    domains = load_domains({name: shops[name] for name in ("books", "toys")})
    assert domains.sources == {"text": {"books": "text", "toys": "title"}, "image": {"toys": "image"}}
    union, toys = domains.catalogue.modalities, Catalogue.load(shops["toys"] / "catalogue").modalities
    assert np.array_equal(union["text"].vectors[17:], toys["title"].vectors[3:])
    assert not union["image"].present[:17].any()
    assert union["image"].present[17:].all()
    assert not union["image"].vectors[:17].any()
    assert union["text"].fingerprint == "ring-text@1"
    assert any("not in books" in line for line in domains.describe())


def test_word_drop_vectors_are_part_of_the_union_where_a_domain_has_them(shops: dict[str, Path]) -> None:
    union = load_domains({name: shops[name] for name in ("books", "toys")}).catalogue.modalities["text"]
    varied = union.variants["word_drop"]
    assert not np.array_equal(varied[3:17], union.vectors[3:17])
    assert np.array_equal(varied[17:], union.vectors[17:])  # toys has none: its texts stay whole


def test_equal_names_and_widths_of_two_encoders_stay_two_modalities(shops: dict[str, Path], tmp_path: Path) -> None:
    other = modality(angles(5), TEXT_WIDTH, 9, "other-text@1")
    write_shop(tmp_path / "art-shop", list("abcde"), {"text": other})
    domains = load_domains({"books": shops["books"], "art-shop": tmp_path / "art-shop"})
    assert domains.sources == {"text": {"books": "text"}, "text_art_shop": {"art-shop": "text"}}
    assert any("not merged with text, which comes from another encoder" in line for line in domains.describe())


def test_an_encoder_without_fingerprint_is_an_error_with_its_cure(tmp_path: Path) -> None:
    write_shop(tmp_path / "shop", list("abcde"), {"text": modality(angles(5), TEXT_WIDTH, 1, None)})
    with pytest.raises(ModalityError, match=r"'shop'.*'text'.*--fingerprint text=ENCODER@REVISION"):
        load_domains({"shop": tmp_path / "shop"})


def test_one_fingerprint_for_two_widths_is_an_error(shops: dict[str, Path], tmp_path: Path) -> None:
    write_shop(tmp_path / "shop", list("abcde"), {"text": modality(angles(5), 3, 1, "ring-text@1")})
    with pytest.raises(ModalityError, match="width 3.*width 8"):
        load_domains({"books": shops["books"], "shop": tmp_path / "shop"})


def test_domains_without_any_modality_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missrec features"):
        load_domains({"shop": write_shop(tmp_path / "shop", list("abcde"), {})})


def test_several_modalities_of_one_encoder_match_by_name_first() -> None:
    known = {"title": "a", "description": "a", "image": "b"}
    assert match_modalities({"description": "a", "name": "a"}, known) == {"description": "description", "name": "title"}
    assert match_modalities({"image": None, "text": "c"}, known | {"image": None}) == {}


def test_domains_have_names(tmp_path: Path) -> None:
    assert named_folders([tmp_path / "a", "b=x/a"]) == {"a": tmp_path / "a", "b": Path("x/a")}
    with pytest.raises(ConfigError, match="two domains are called 'data'"):
        named_folders(["x/data", "y/data"])
