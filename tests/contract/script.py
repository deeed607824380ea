"""A script of Transformers4Rec that `test_saving.py` runs in two processes, as torchrun does."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import missrec_t4r as mr
from tests.contract.test_saving import a_trainer, by_hand

if __name__ == "__main__":
    data, out = Path(sys.argv[1]), Path(sys.argv[2])
    model = by_hand()
    trainer = a_trainer(model, data, out / "t4r", data_loader_engine="missrec")
    trainer.train()
    until = time.monotonic() + 120
    while os.environ["RANK"] == "1" and not (out / "run" / "run.json").is_file() and time.monotonic() < until:
        time.sleep(0.1)  # the second process comes when the first one's run is there
    info = mr.save_run(model, trainer=trainer, out=out / "run")
    assert (Path(info["run"]) / "run.json").is_file()
    assert trainer.evaluate()["eval_/next-item/ndcg_at_10"] > 0, "its model has the terms as well"
