"""A staged folder may be read by the server's user, whatever the libraries that wrote its files thought."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from missrec_t4r.io.atomic import atomic_write_dir


def test_everybody_may_read_what_was_staged(tmp_path: Path) -> None:
    with atomic_write_dir(tmp_path / "bundle", "manifest.json") as folder:
        (folder / "inner").mkdir()
        save_file({"weight": torch.ones(1)}, folder / "inner" / "model.safetensors")
        (folder / "run.sh").touch(0o700)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "bundle").rglob("*")}
    assert modes == {"inner": 0o755, "model.safetensors": 0o644, "run.sh": 0o744}
