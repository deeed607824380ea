"""A run that goes on where only the first process finds its folder, as on two machines without a shared disk."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from missrec_t4r.training import distributed
from missrec_t4r.training.fit import train

if __name__ == "__main__":
    data, out = Path(sys.argv[1]), Path(sys.argv[2])
    with distributed.joined(torch.device("cpu")) as world:
        for epochs in (1, 2):
            settings = {"train.epochs": epochs}
            train(data, out / str(world.rank), recipe="tiny", settings=settings, device="cpu")
