"""The classical encoders: what is similar, what is missing, what is recorded."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import sklearn
from PIL import Image
from sklearn.feature_extraction.text import HashingVectorizer

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import ConfigError, SchemaError
from missrec_t4r.etl.features import sklearn_encoders
from missrec_t4r.etl.features.pipeline import encode_items, features, item_texts
from missrec_t4r.etl.features.sklearn_encoders import encode_images, encode_texts
from missrec_t4r.etl.pipeline import etl
from missrec_t4r.etl.sources.synthetic.shop_images import draw
from missrec_t4r.etl.sources.synthetic.shop_text import STYLES
from tests.workflows.tables import EVENTS, save_vectors, write

ITEMS = pd.DataFrame(
    {
        "item_id": ["lamp", "desk", "sofa", "vase"],
        "title": ["red desk lamp", "red oak desk", None, "!?"],
        "brand": ["Lumo", "Fjell", " ", None],
        "picture": ["lamp.png", "desk.png", "sofa.png", "gone.png"],
    }
)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    Image.new("RGB", (30, 20), "red").save(tmp_path / "lamp.png")
    Image.new("L", (9, 9), 40).save(tmp_path / "desk.png")
    (tmp_path / "sofa.png").write_bytes((tmp_path / "lamp.png").read_bytes()[:40])  # cut short
    etl(*write(tmp_path / "raw", EVENTS, ITEMS), tmp_path / "data")
    return tmp_path


def test_what_is_empty_absent_or_broken_is_missing_and_listed(shop: Path, caplog: pytest.LogCaptureFixture) -> None:
    report = features(shop / "data", text_columns=["title", "brand"], image_column="picture", images=shop)
    text, image = report["modalities"]["text"], report["modalities"]["image"]
    assert (text["items"], text["missing_items"], text["broken"]) == (2, ["sofa", "vase"], 0)
    assert (image["items"], image["missing_items"], image["broken_items"]) == (2, ["sofa", "vase"], ["sofa"])
    words = f"1 of 4 pictures that the items name are not in {shop} (vase): these items get no image vector"
    assert words in caplog.text
    modalities = Catalogue.load(shop / "data" / "catalogue").modalities
    for modality in modalities.values():
        assert modality.present.tolist() == [False, False, False, True, True, False, False]
        np.testing.assert_allclose(np.linalg.norm(modality.vectors[3:5], axis=1), 1, rtol=1e-5)
        assert not modality.vectors[[0, 1, 2, 5, 6]].any()


def test_the_words_are_a_modality_beside_given_vectors(shop: Path) -> None:
    vectors = {"text": save_vectors(shop / "text.npy", np.ones((4, 3)))}
    etl(*write(shop / "raw", EVENTS, ITEMS), shop / "data", modality=vectors)
    report = features(shop / "data", word_columns=["title", "brand"])
    assert (report["modalities"]["words"]["items"], report["replaced"]) == (2, [])
    catalogue = Catalogue.load(shop / "data" / "catalogue")
    assert list(catalogue.modalities) == ["text", "words"]
    new = encode_items(shop / "data", pa.table({"item_id": ["lamp2"], "title": ["red desk lamp"], "brand": ["Lumo"]}))
    np.testing.assert_allclose(new["words"].vectors[0], catalogue.modalities["words"].vectors[3], atol=1e-6)


@pytest.mark.parametrize("columns", ["text_columns", "word_columns"])
@pytest.mark.parametrize("dry_run", [True, False])
def test_more_columns_than_words_are_hashed_to_are_refused(shop: Path, columns: str, dry_run: bool) -> None:
    options = {columns: ["title"], "width": 262_145, "dry_run": dry_run}
    with pytest.raises(
        ConfigError, match=r"--width 262,145; expected: at most 262,144 for texts, .* leave it out: 512"
    ):
        features(shop / "data", **options)
    assert not Catalogue.load(shop / "data" / "catalogue").modalities
    images = features(shop / "data", images=shop, width=262_145)["modalities"]["image"]
    assert images["width"] == 1  # of pictures it is an upper bound


def test_pictures_are_found_by_item_id_without_a_column(shop: Path) -> None:
    report = features(shop / "data", images=shop)
    assert report["modalities"]["image"]["missing_items"] == ["sofa", "vase"]


def test_the_fingerprint_says_that_a_classical_encoder_stands_in(shop: Path) -> None:
    features(shop / "data", text_columns=["title"], image_column="picture", images=shop)
    recorded = json.loads((shop / "data" / "catalogue" / "catalogue.json").read_text())["modalities"]
    assert recorded["text"]["encoder"]["columns"] == ["title"]
    for name in ("text", "image"):
        encoder = recorded[name]["encoder"]
        assert encoder["name"] == f"classical-{name}"
        assert encoder["stands_in_for"] == f"a pretrained {name} encoder"
        assert encoder["library"] == f"scikit-learn {sklearn.__version__}"


def test_the_fingerprint_of_given_vectors_is_as_stated(shop: Path) -> None:
    vectors = {"text": save_vectors(shop / "text.npy", np.ones((4, 3)))}
    etl(*write(shop / "raw", EVENTS, ITEMS), shop / "data", modality=vectors, fingerprint={"text": "minilm-l6-v2"})
    assert Catalogue.load(shop / "data" / "catalogue").modalities["text"].fingerprint == "minilm-l6-v2"
    with pytest.raises(ConfigError, match=r"--fingerprint image=x; expected: NAME=TEXT with a name among \['text'\]"):
        etl(*write(shop / "raw", EVENTS, ITEMS), shop / "data", modality=vectors, fingerprint={"image": "x"})


def test_other_modalities_stay_and_the_same_one_is_replaced(shop: Path, caplog: pytest.LogCaptureFixture) -> None:
    vectors = {name: save_vectors(shop / f"{name}.npy", np.ones((4, 3))) for name in ("text", "audio")}
    etl(*write(shop / "raw", EVENTS, ITEMS), shop / "data", modality=vectors)
    report = features(shop / "data", text_columns=["title"])
    catalogue = Catalogue.load(shop / "data" / "catalogue")
    assert report["replaced"] == ["text"]
    assert (
        "the vectors of text from text.npy are replaced by those of an encoder; --modality brings them" in caplog.text
    )
    caplog.clear()
    features(shop / "data", text_columns=["title"])
    assert "are replaced" not in caplog.text
    assert {name: modality.encoder["name"] for name, modality in catalogue.modalities.items()} == {
        "text": "classical-text",
        "audio": "precomputed",
    }


def test_texts_about_the_same_are_close() -> None:
    texts = ["alpine camping tent", "light camping tents", "espresso machine", "espresso grinder machine", "oak chisel"]
    encoded = encode_texts(texts)
    cosine = encoded.vectors @ encoded.vectors.T
    assert cosine[0, 1] > 0.2 + cosine[0, 2:].max()
    assert cosine[2, 3] > 0.3 + cosine[2, [0, 1, 4]].max()
    np.testing.assert_array_equal(encode_texts(texts).vectors, encoded.vectors)


def _word(number: int) -> str:
    """Return a made-up word of eight letters."""
    return "".join(np.random.default_rng(number).choice(list("abcdefghijklmnopqrstuvwxyz"), 8))


def test_a_brand_that_few_items_have_makes_them_alike() -> None:
    kinds = ["camping tent", "desk lamp", "espresso machine", "oak chisel"]
    texts = [f"{_word(brand)} {kind} {_word(1000 + n)}" for brand in range(90) for n, kind in enumerate(kinds)]
    vectors = encode_texts(texts).vectors
    cosine = vectors @ vectors.T - 2 * np.eye(len(texts))
    nearest = np.argsort(-cosine, 1)[:, :3]
    same_brand = nearest // len(kinds) == np.arange(len(texts))[:, None] // len(kinds)
    assert same_brand.mean() > 0.9


def test_words_never_seen_before_make_new_items_alike() -> None:
    state = encode_texts(["red desk lamp", "red oak desk"]).state
    new = encode_texts(["quokka tripod", "tripod quokka", "red desk lamp"], state=state).vectors
    assert new[0] @ new[1] > 0.7 > 0.3 > new[0] @ new[2]


def test_a_text_without_a_word_alone_lacks_the_modality(shop: Path) -> None:
    features(shop / "data", word_columns=["title", "brand"])
    new = encode_items(shop / "data", pa.table({"item_id": ["new"], "title": ["-"], "brand": ["?!"]}))["words"]
    assert not new.present.any()
    assert not new.vectors.any()
    with pytest.raises(
        SchemaError, match="items without brand; .* 'words' is encoded from: title, brand. .*--modality"
    ):
        encode_items(shop / "data", pa.table({"item_id": ["new"], "title": ["lamp"]}))


def test_many_texts_are_encoded_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [None, "red desk lamp", "!?", "red oak desk", "blue vase"]
    at_once = encode_texts(texts)
    monkeypatch.setattr(sklearn_encoders, "_CHUNK", 2)
    np.testing.assert_array_equal(encode_texts(texts).vectors, at_once.vectors)


def test_texts_are_encoded_as_by_an_earlier_version_with_its_state() -> None:
    used = np.array([sum(HashingVectorizer(n_features=2**15).transform(["lamp"]).indices)])
    state = {"columns": used.astype(np.int32), "idf": np.ones(1, np.float32), "components": np.ones((3, 1), np.float32)}
    encoded = encode_texts(["lamp", "desk", None], state=state)
    np.testing.assert_allclose(encoded.vectors, [[3**-0.5] * 3, [0] * 3, [0] * 3], rtol=1e-6)
    assert encoded.present.tolist() == [True, True, False]
    assert not encode_texts(["-"], state=state).present.any()


def test_pictures_of_one_style_are_close(tmp_path: Path) -> None:
    paths = []
    for number in range(36):
        paths.append(tmp_path / f"{number}.png")
        draw(STYLES[number % 6], np.random.default_rng(number)).save(paths[-1])
    encoded = encode_images(paths, width=16)
    cosine = encoded.vectors @ encoded.vectors.T - 2 * np.eye(36)
    assert (cosine.argmax(1) % 6 == np.arange(36) % 6).mean() > 0.9  # the nearest picture has the same style
    np.testing.assert_array_equal(encode_images(paths, width=16).vectors, encoded.vectors)


def test_the_texts_of_several_columns_are_joined() -> None:
    items = pa.table({"title": ["a", None, " "], "brand": ["b ", "c", None]})
    assert item_texts(items, ["title", "brand"]) == ["a. b", "c", None]
