"""Hostile requests, drawn at random over all inputs: for the long run against a server, and for the property test.

A request is a good one with one to three of its tensors replaced, removed or added. Nothing is said of what it
deserves, an error or an answer; what counts is that it harms no other request.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np

Tensors = dict[str, Any]

TEXTS = ("rules", "side")
"""Inputs that hold JSON."""
NUMBERS = ("length", "top_k", "exclude_seen", "reasons")
IDS = ("item_ids", "exclude", "allow")
ROWS = ("rows", "seen")
EXTREMES = (0, 1, -1, 2, 3, 7, 50, 127, 65_537, 2**31 - 1, -(2**31), 2**62, -(2**63))
COLUMNS = ("train_count", "item_id", "price", "brand", "event_type", "dwell", "scene", "__class__", "", "ü\\u0000")
LONG = 70_000
"""Longer than what rules may be."""
_BUDGET = 200
"""Values of one JSON text, about."""


def hostile_request(chance: random.Random, good: Tensors, inputs: tuple[str, ...], *, rich: bool = True) -> Tensors:
    """Return a request that differs from a good one in one to three tensors.

    Parameters
    ----------
    chance : Random
    good : mapping of str to ndarray
    inputs : tuple of str
        Inputs of the model.
    rich : bool
        Whether texts and tensors may be long.
    """
    request = dict(good)
    for name in chance.sample(inputs, chance.randint(1, min(3, len(inputs)))):
        kind = chance.randrange(12)
        if kind == 0:
            request.pop(name, None)
        elif kind == 1:
            request[chance.choice(("password", "__class__", name + "\0"))] = np.array([[1]], np.int32)
        else:
            request[name] = tensor(chance, name, good, rich)
    return request


def tensor(chance: random.Random, name: str, good: Tensors, rich: bool) -> Any:
    """Return a tensor for an input: often of its own kind with odd content, sometimes of any kind."""
    sessions = len(next(iter(good.values())))
    batch = chance.choice((sessions, sessions, sessions, sessions, 0, sessions + 1, 7))
    if chance.random() < 0.25:
        return anything(chance, batch)
    if name in TEXTS:
        return np.array([[text(chance, name, rich)] for _ in range(batch)], object).reshape(batch, 1)
    if name in NUMBERS:
        flag = name in ("exclude_seen", "reasons")
        values = [[chance.choice((True, False)) if flag else chance.choice(EXTREMES[:-2])] for _ in range(batch)]
        return np.array(values, bool if flag else np.int64).reshape(batch, 1).astype(bool if flag else np.int32)
    width = chance.choice((0, 1, 2, 3, 9, LONG if rich else 60))
    if name in ROWS or good.get("item_ids", np.zeros(0, object)).dtype != object:
        return np.full((batch, width), chance.choice(EXTREMES), np.int64)
    short = (b"", b"\xff\xfe", b"a\0b", "ware-ü".encode())
    return np.full((batch, width), chance.choice(short if width > 100 else (*short, b"x" * 5000)), object)


def anything(chance: random.Random, batch: int) -> Any:
    """Return a tensor of any type and shape."""
    shape = chance.choice(((batch,), (batch, 1), (batch, 2), (batch, 3, 2), (1, batch), (batch, 0), ()))
    kind = chance.choice((np.int32, np.int64, np.float32, np.float64, bool, np.uint8, object, np.int16))
    if kind is object:
        return np.full(shape, chance.choice((b"", b"1", b"\xff", b"{}")), object)
    if kind in (np.float32, np.float64):
        return np.full(shape, chance.choice((np.nan, np.inf, -np.inf, 1.5, 1e30)), kind)
    return np.full(shape, chance.choice(EXTREMES), np.int64).astype(kind)


def text(chance: random.Random, name: str, rich: bool) -> bytes:
    """Return bytes for an input that holds JSON: of its form, of another form, or no JSON at all."""
    kind = chance.randrange(8)
    if kind == 0:
        return chance.choice((b"", b" ", b"\xff\xfe", b"{", b"null", b"\0", b'"', b"[" * 30_000, b'{"a":' * 30_000))
    if kind == 1 and rich:
        return b'{"%s": "%s"}' % (name.encode(), b"x" * chance.choice((LONG, 3_000_000)))
    if kind == 2:
        return value(chance, [_BUDGET]).encode("utf-8", "surrogatepass")
    if name == "side":
        content = record(chance, COLUMNS[4:], lambda: array(chance, chance.choice((0, 1, 2, 2, 2, 9)), [_BUDGET]))
    else:
        keys = ("where", "at_most", "where", "at_most", "select")
        content = record(chance, keys, lambda: record(chance, COLUMNS, lambda: condition(chance)))
    return content.encode("utf-8", "surrogatepass")


def condition(chance: random.Random) -> str:
    """Return JSON in the place of a condition or a cap."""
    if chance.random() < 0.4:
        return record(chance, ("min", "max", "mean"), lambda: value(chance, [2]))
    return value(chance, [20])


def record(chance: random.Random, keys: tuple[str, ...], make: Any) -> str:
    """Return a JSON object of some keys, which may repeat."""
    pairs = [f'"{chance.choice(keys)}": {make()}' for _ in range(chance.randint(0, 3))]
    return "{" + ", ".join(pairs) + "}"


def array(chance: random.Random, length: int, budget: list[int]) -> str:
    """Return a JSON list of any values."""
    return "[" + ", ".join(value(chance, budget) for _ in range(length)) + "]"


def value(chance: random.Random, budget: list[int]) -> str:
    """Return any JSON value, and some that are none."""
    budget[0] -= 1
    kind = chance.randrange(9 if budget[0] > 0 else 6)
    if kind == 0:
        return chance.choice(("null", "true", "false", "NaN", "Infinity", "-Infinity"))
    if kind == 1:
        return str(chance.choice(EXTREMES))
    if kind == 2:
        return chance.choice(
            ("1" + "0" * 400, "-1" + "0" * 400, "1" + "0" * 5000, "1e999", "0.1e-999", "1" * 4000 + ".5")
        )
    if kind in (3, 4):
        return chance.choice(('""', '"buy"', '"\\ud800"', '"\\u0000"', '"' + "y" * 300 + '"', '"0"', '"DROP TABLE"'))
    if kind == 5:
        return repr(chance.choice((0.5, 1e308, -1e39, 5e-324)))
    if kind == 6:
        return array(chance, chance.randint(0, 4), budget)
    if kind == 7:
        return record(chance, COLUMNS, lambda: value(chance, budget))
    return "[" * 900 + "]" * 900
