"""Does a bill of materials hold every pin? Called by `make sbom`; standard library only."""

import json
import re
import sys


def missing(sbom, requirements):
    """Return the pins that the bill of materials lacks or has in another version."""
    with open(sbom, encoding="utf-8") as file:
        components = json.load(file).get("components", ())
        listed = {(_name(one["name"]), one.get("version", "").partition("+")[0]) for one in components}  # torch's +cpu
    pins = set()
    for path in requirements:
        with open(path, encoding="utf-8") as file:
            found = (re.match(r"([\w.-]+)(?:\[[^\]]*\])?==([^\s;#]+)", line) for line in file)
            pins |= {(_name(pin[1]), pin[2]) for pin in found if pin}
    return pins - listed, len(pins)


def _name(name):
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    absent, count = missing(sys.argv[1], sys.argv[2:])
    if absent:
        sys.exit(
            f"{sys.argv[1]} lacks {sorted(absent)}; expected: every pin of {', '.join(sys.argv[2:])}. "
            "Make the environment anew: make install."
        )
    print(f"{sys.argv[1]}: {count} pins")
