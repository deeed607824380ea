"""Bundles whose files are well-formed and sealed, and do not belong together: sizes, shapes and numbers that attack."""

from __future__ import annotations

import json
import resource
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from shutil import copyfile, copytree
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from missrec_t4r import commands
from missrec_t4r.bundle import manifest
from missrec_t4r.bundle.bundle import load_bundle, write_bundle
from missrec_t4r.bundle.item_table import load_session_transform
from missrec_t4r.bundle.manifest import SEARCH_FILE, write_manifest
from missrec_t4r.bundle.shapes import check_numbers, stated
from missrec_t4r.errors import BundleError, ServingError
from missrec_t4r.io.parquet_limits import decoded_bytes, inspect
from missrec_t4r.retrieval.filters import Rules
from missrec_t4r.retrieval.ranker import Ranker
from missrec_t4r.runs.run_folder import LoadedRun
from missrec_t4r.serving.client.client import MISSRecClient

WEIGHTS, VECTORS, ITEMS = "weights.safetensors", "catalogue.safetensors", "items.parquet"
MEGABYTE = 1 << 20

Spoil = Callable[[Path], None]


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(copytree(bundle, tmp_path / "bundle"))


def refused(folder: Path, words: str) -> None:
    """`missrec bundle verify`, which loads the bundle as the server does, refuses one that was sealed again."""
    write_manifest(folder)
    with pytest.raises(BundleError, match=rf"(?s){words}"):
        commands.verify(folder)


# Numbers


def changed(file: Path, **tensors: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace tensors of a file; ``__`` stands for a dot in their names."""
    stored = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for name, change in tensors.items():
        stored[name.replace("__", ".")] = change(stored[name.replace("__", ".")]).contiguous()
    save_file(stored, file)


def put(value: float, *at: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[at] = value
        return tensor

    return change


def test_nan_in_any_tensor_is_refused_and_named(bundle: Path, copy: Path) -> None:
    tried = 0
    for file in (WEIGHTS, VECTORS):
        for name, tensor in load_file(bundle / file).items():
            if not tensor.is_floating_point():
                continue
            last = tuple(size - 1 for size in tensor.shape)
            copyfile(bundle / file, copy / file)
            changed(copy / file, **{name: put(float("inf" if tensor.dim() % 2 else "nan"), *last)})
            with pytest.raises(BundleError, match=rf"{file} holds NaN or infinity in {name}, row {(last or (0,))[0]}"):
                check_numbers(copy, stated(copy))
            tried += 1
        copyfile(bundle / file, copy / file)
    assert tried > 50
    changed(copy / WEIGHTS, fusion__phi=put(float("nan"), 0))
    refused(copy, "holds NaN or infinity in fusion.phi, row 0")


@pytest.mark.parametrize("value", [-1, 33, 1 << 30])
@pytest.mark.parametrize("name", ["terms.item_knn.neighbours", "terms.content_knn.alike"])
def test_rows_outside_the_catalogue_are_refused_before_anything_is_allocated(name: str, value: int, copy: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    changed(copy / WEIGHTS, **{name: put(value, 4, 0)})
    refused(copy, rf"{WEIGHTS} holds {value} in {name}, row 4; expected: 0 to 32")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # kilobytes; 8.6 GB before


def test_interests_that_do_not_exist_are_refused(copy: Path) -> None:
    changed(copy / VECTORS, interests__assignment=put(1000, 1, 7))
    refused(copy, f"{VECTORS} holds 1000 in interests.assignment, row 1; expected: 0 to ")


def test_negative_counts_are_refused(copy: Path) -> None:
    changed(copy / WEIGHTS, terms__item_knn__frequency=put(-9.0, 5))
    refused(copy, "holds -9 in terms.item_knn.frequency, row 5; expected: no negative number")


def test_a_mask_holds_zeros_and_ones(copy: Path) -> None:
    file = copy / VECTORS
    content = bytearray(file.read_bytes())
    header = json.loads(bytes(content[8 : 8 + struct.unpack("<Q", content[:8])[0]]))
    start = 8 + struct.unpack("<Q", content[:8])[0] + header["modality.image.present"]["data_offsets"][0]
    content[start + 6] = 7
    file.write_bytes(content)
    refused(copy, "holds 7 in modality.image.present, row 6; expected: 0 to 1")


# Shapes


def described(folder: Path, **changes: Any) -> None:
    """Change entries of ``model.json``, with ``config__`` in front those of the configuration."""
    file = folder / "model.json"
    content = json.loads(file.read_text())
    for name, value in changes.items():
        part = content["config"] if name.startswith("config__") else content
        part[name.removeprefix("config__")] = value
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: described(f, config__d_model=16_000_000), "instead of F32 .*16000000"),
        (lambda f: described(f, config__d_feedforward=1 << 40), f"{WEIGHTS} holds .*1099511627776"),
        (lambda f: described(f, config__n_encoder_layers=10**9), "those of 1000000002 layers"),
        (lambda f: described(f, config__max_sequence_length=1 << 40), f"{WEIGHTS} holds .*1099511627776"),
        (lambda f: described(f, config__n_neighbours=-5), "negative"),
        (lambda f: described(f, config__candidate_fusion="static"), "fusion.phi, which is not expected"),
        (lambda f: described(f, rows=10**9), f"{VECTORS} holds 33 rows; expected: at least the 1000000000"),
        (lambda f: described(f, rows=-1), "model.json states rows"),
        (lambda f: described(f, rows=True), "model.json states rows"),
        (lambda f: described(f, modalities={"text": 12}), "modality.image.* which is not expected"),
        (lambda f: described(f, modalities={}), "model.json states rows"),
        (lambda f: described(f, modalities={"text": 12, "image": 1 << 50}), "instead of F32 .*1125899906842624"),
        (lambda f: described(f, modalities=[]), "does not describe a model"),
        (lambda f: described(f, config=None), "does not describe a model"),
        (lambda f: described(f, event_features=[{"name": "x", "kind": "categorical", "size": 1 << 50}]), WEIGHTS),
        (
            lambda f: described(f, event_features=[{"name": "x", "kind": "categorical", "size": "9"}]),
            "event feature 'x'",
        ),
        (lambda f: described(f, event_features=[{"name": "x", "kind": "audio"}]), "event feature 'x'"),
        (lambda f: described(f, event_features=7), "do not fit each other"),
        (lambda f: changed(f / WEIGHTS, fusion__phi=lambda phi: phi.repeat(32)), r"fusion.phi of F32 \[32\]"),
        (lambda f: changed(f / WEIGHTS, fusion__phi=lambda phi: phi.double()), "fusion.phi of F64"),
        (lambda f: changed(f / VECTORS, interests__assignment=lambda table: table[:1]), r"assignment of I64 \[1, 33\]"),
        (lambda f: changed(f / VECTORS, modality__text__vectors=lambda table: table[:, :0]), r"of F32 \[33, 0\]"),
    ],
)
def test_shapes_that_the_model_does_not_have_are_refused_before_they_are_allocated(
    spoil: Spoil, words: str, copy: Path
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    spoil(copy)
    refused(copy, words)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_a_table_of_more_rows_than_the_catalogue_is_refused_unread(copy: Path) -> None:
    """Eight million rows in some kilobytes: every column is one value, repeated."""
    small = pa.table({"item_id": pa.repeat("a", MEGABYTE), "train_count": pa.repeat(1, MEGABYTE)})
    with pq.ParquetWriter(copy / ITEMS, small.schema) as writer:
        for _ in range(8):
            writer.write_table(small)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (copy / ITEMS).stat().st_size < 100_000
    refused(copy, f"{ITEMS} has {8 * MEGABYTE} rows; expected: 30, one per item")
    with pytest.raises(BundleError, match="rows; expected: 30"):
        load_session_transform(copy)  # the server's other model
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # kilobytes


def rewritten(folder: Path, columns: Mapping[str, Any], **options: Any) -> None:
    """Write the item table again, with other or further columns."""
    table = pq.read_table(folder / ITEMS)
    for name, values in columns.items():
        array = values if isinstance(values, pa.Array) else pa.array(values)
        place = table.column_names.index(name) if name in table.column_names else table.num_columns
        table = table.remove_column(place) if place < table.num_columns else table
        table = table.add_column(place, name, array)
    pq.write_table(table, folder / ITEMS, **options)


LONG = "x" * (MEGABYTE // 4)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: rewritten(f, {"note": [LONG] * 30}), "takes .* bytes of memory or more"),
        (lambda f: rewritten(f, {"note": [[LONG] * 3] * 30}), "takes .* bytes of memory or more"),
        (lambda f: rewritten(f, {"n": [[7] * 10_000] * 30}), "takes .* bytes of memory or more"),
        (lambda f: rewritten(f, {}, use_dictionary=False, column_encoding={"title": "DELTA_BYTE_ARRAY"}), "encoding 7"),
        (lambda f: rewritten(f, {}, compression="gzip"), "compressed by GZIP"),
        (lambda f: rewritten(f, {"item_id": ["same"] * 30}), "30 item ids, 1 of them different"),
        (lambda f: rewritten(f, {"item_id": ["", *map(str, range(29))]}), "an item id is the empty string"),
        (lambda f: rewritten(f, {"item_id": [None, *map(str, range(29))]}), "missing item ids"),
        (lambda f: rewritten(f, {"item_id": [float(i) for i in range(30)]}), "item ids of type double"),
        (lambda f: rewritten(f, {"item_id": ["y" * 20_000, *map(str, range(29))]}), "an item id of more than"),
        (lambda f: rewritten(f, {"train_count": [-1] * 30}), "not whole numbers from 0 on"),
        (lambda f: rewritten(f, {"train_count": [0.5] * 30}), "not whole numbers from 0 on"),
        (lambda f: rewritten(f, {"train_count": [None] * 30}), "counts that are not whole numbers|counts"),
        (lambda f: rewritten(f, {"retired": ["yes"] * 30}), "'retired' of type string"),
    ],
)
def test_item_tables_that_attack_are_refused(
    spoil: Spoil, words: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("missrec_t4r.bundle.item_table._SMALL_TABLE", MEGABYTE)
    spoil(copy)
    refused(copy, f"({ITEMS}.*)?{words}")


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def test_a_deeply_nested_schema_does_not_end_the_process(copy: Path) -> None:
    """Arrow follows the groups of a schema by recursion: five thousand of them end the process with a signal."""
    depth = 5000
    group = b"\x35\x02\x18\x01a\x15\x02\x00"  # optional, called a, one child
    elements = [group] * depth + [b"\x15\x02\x25\x02\x18\x01x\x00"]
    schema = b"\x19\xfc" + varint(len(elements)) + b"".join(elements)
    footer = b"\x15\x04" + schema + b"\x16\x00\x19\x0c\x00"
    (copy / ITEMS).write_bytes(b"PAR1" + footer + struct.pack("<I", len(footer)) + b"PAR1")
    refused(copy, f"{ITEMS} has columns nested 5000 deep, at most 8")


def test_the_bound_of_a_table_is_an_upper_bound(tmp_path: Path) -> None:
    """Texts, lists, missing values and numbers, in several row groups, with and without a dictionary."""
    rng = np.random.default_rng(0)
    texts = [None if one % 7 == 0 else "t" * int(one) for one in rng.integers(0, 300, 2000)]
    table = pa.table(
        {
            "a.b": texts,
            "lists": [[text] * (place % 4) for place, text in enumerate(texts)],
            "n": rng.integers(0, 9, 2000),
            "x": rng.normal(size=2000),
            "when": pa.array(rng.integers(0, 10**9, 2000), pa.timestamp("us")),
            "price": pa.array([None] * 2000, pa.decimal128(12, 2)),
        }
    )
    for dictionary in (True, False):
        for version in ("1.0", "2.0"):
            file = tmp_path / f"{dictionary}{version}.parquet"
            options: dict[str, Any] = {"use_dictionary": dictionary, "data_page_version": version}
            pq.write_table(table, file, row_group_size=700, data_page_size=2000, **options)
            contents = inspect(file)
            assert contents.rows == 2000
            bound = decoded_bytes(file, contents, 100 * MEGABYTE)
            assert table.nbytes <= bound <= 100 * MEGABYTE
            exact = decoded_bytes(file, contents, 2 * table.nbytes)
            assert table.nbytes <= exact
            if not dictionary:
                assert exact < 3 * table.nbytes


# Headers


def with_header(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Write a safetensors file again with another header over the same numbers."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    changed = change(header)
    text = changed if isinstance(changed, bytes) else json.dumps(header if changed is None else changed).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def of(name: str, **entries: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(entries)


def overlapping(header: dict[str, Any]) -> None:
    one, other = (header[f"encoder.layers.0.self_attention.{name}.weight"] for name in ("query", "key"))
    one["data_offsets"] = other["data_offsets"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (overlapping, "invalid offset for tensor|InvalidOffset"),  # safetensors 0.4 has words of its own
        (of("fusion.phi", shape=[1 << 40]), "invalid shape|TensorInvalidInfo"),
        (of("fusion.phi", shape=[1 << 62, 1 << 62]), "overflow|Overflow"),
        (of("fusion.phi", shape=[-33, -1]), "integer `-33`|InvalidHeader"),
        (of("fusion.phi", shape=[33.0]), "floating point|InvalidHeader"),
        (of("fusion.phi", shape=[True]), "boolean `true`|InvalidHeader"),
        (lambda header: header["fusion.phi"]["shape"].extend([1] * 1000), "fusion.phi of F32"),
        (of("fusion.phi", dtype="I32"), "fusion.phi of I32"),
        (of("fusion.phi", dtype="U32"), "of type U32"),
        (of("fusion.phi", dtype=["F32"]), "not a safetensors file"),
        (lambda header: header.update(__metadata__={"a": 1}), "not a safetensors file"),
        (lambda header: b"[" * 100_000, "not a safetensors file"),
        (lambda header: b"[" * 2_000_000, "not a safetensors file"),
        (lambda header: b"[]", "not a safetensors file"),
        (lambda header: json.dumps(header).encode()[:-1] + b',"fusion.phi":{}}', "not a safetensors file"),
    ],
)
def test_crafted_headers_are_refused(change: Callable[[dict[str, Any]], Any], words: str, copy: Path) -> None:
    with_header(copy / WEIGHTS, change)
    refused(copy, f"{WEIGHTS} .*({words})")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "not JSON"),
        ("[" + "[]," * 300_000 + "[]]", "lists and objects"),
        (" " * (17 << 20), "bytes; expected: at most"),
        ('{"rows": NaN}', "NaN is not a number of JSON"),
        ('{"rows": 1' + "0" * 5000 + "}", "not JSON|does not describe"),
        ("null", "does not describe a model"),
    ],
)
def test_crafted_json_is_refused(text: str, words: str, copy: Path) -> None:
    (copy / "model.json").write_text(text)
    refused(copy, f"model.json .*({words})")


@pytest.mark.parametrize(
    "change",
    [
        *({"model.json": entry} for entry in (7, {}, {"bytes": "9", "sha256": ""}, {"bytes": 9, "sha256": None})),
        {"files": [*manifest.BUNDLE_FILES]},
        {"recount": 7},
    ],
)
def test_a_sealed_manifest_of_another_form_is_refused(change: dict[str, object], copy: Path) -> None:
    content = write_manifest(copy)
    for name, value in change.items():
        (content["files"] if name in content["files"] else content)[name] = value
    (copy / "manifest.json").write_bytes(manifest._serialise(content))
    with pytest.raises(BundleError, match="manifest.json is damaged"):
        load_bundle(copy)


# The retrieval index


@pytest.fixture
def large(loaded: LoadedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("missrec_t4r.bundle.bundle.SEARCH_FROM", 10)
    write_bundle(tmp_path / "large", model=loaded.model, catalogue=loaded.catalogue, data=loaded.data)
    return tmp_path / "large"


def exchanged(tensor: torch.Tensor) -> torch.Tensor:
    """The tokens of two rows, one for the other."""
    tensor[0, [5, 9]] = tensor[0, [9, 5]]
    return tensor


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("table.place", exchanged, "names the tokens of other rows"),
        ("table.place", put(-2, 0, 3), "holds -2 in table.place, row 0"),
        ("table.place", put(10**9, 1, 4), "holds 1000000000 in table.place, row 1"),
        ("table.several", put(1, 0), "names the tokens of other rows"),
        ("table.modality", put(2, 0, 3), "holds 2 in table.modality, row 0; expected: -1 to 1"),
        ("table.tokens", put(float("nan"), 3, 0), "NaN or infinity in table.tokens, row 3"),
        ("table.phi", put(float("inf"), 3), "NaN or infinity in table.phi, row 3"),
        ("quantised.scale", put(float("nan"), 3), "NaN or infinity in quantised.scale, row 3"),
        ("quantised.rest", put(-1.0, 3), "holds -1 in quantised.rest, row 3"),
        ("quantised.error", lambda one: one * float("nan"), "NaN or infinity in quantised.error"),
        ("quantised.mean", lambda one: one.double(), "quantised.mean of F64"),
        ("quantised.directions", lambda one: one[:, :-1], "quantised.directions of F32"),
    ],
)
def test_a_crafted_retrieval_index_is_refused(
    name: str, change: Callable[[torch.Tensor], torch.Tensor], words: str, large: Path
) -> None:
    load_bundle(large)
    changed(large / SEARCH_FILE, **{name: change})
    refused(large, f"{SEARCH_FILE} .*{words}")


def test_the_index_of_another_model_of_the_same_shape_is_refused(large: Path) -> None:
    changed(large / SEARCH_FILE, **{"table.tokens": lambda tokens: tokens.roll(1, 0)})
    refused(large, f"{SEARCH_FILE} holds the tokens of another model or catalogue")


def test_bounds_below_the_scores_are_refused(large: Path) -> None:
    """With bounds that are too low the search would stop before the best items."""
    changed(large / SEARCH_FILE, **{"quantised.codes": torch.zeros_like, "quantised.rest": torch.zeros_like})
    refused(large, f"{SEARCH_FILE} holds the tokens of another model or catalogue")


# Finite, and too large


def test_weights_that_give_no_scores_are_an_error_and_never_an_empty_answer(copy: Path) -> None:
    """Every number is finite, their products are not: no list is empty unless a filter says why."""
    changed(copy / WEIGHTS, **{"item_encoder.adapters.text.weight": lambda weight: weight * 1e38})
    changed(copy / WEIGHTS, **{"item_encoder.adapters.image.weight": lambda weight: weight * 1e38})
    write_manifest(copy)
    loaded = load_bundle(copy)
    ranker = Ranker(loaded.model, loaded.catalogue)
    with pytest.raises(ServingError, match="items have a score that is a number; expected: a finite score"):
        ranker.rank(np.array([[5, 9, 4]]), top_k=5)
    with pytest.raises(ServingError, match="items have a score that is a number"):
        MISSRecClient.of_bundle(copy)  # it ranks one session when it starts, as a server does


def test_an_empty_answer_has_a_filter_that_explains_it(bundle: Path) -> None:
    loaded = load_bundle(bundle)
    ranker = Ranker(loaded.model, loaded.catalogue)
    nothing = ranker.rank(np.array([[5, 9]]), rules=[Rules.parse('{"where": {"price": {"min": 1000}}}')])
    assert (nothing.n_items.tolist(), nothing.n_passed.tolist()) == ([0], [0])
    capped = ranker.rank(np.array([[5, 9]]), top_k=30, rules=[Rules.parse('{"at_most": {"brand": 1}}')])
    assert 0 < capped.n_items[0] < 30
