"""Groups of processes, with the variables that torchrun sets."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from tests import processes


def run(words: Sequence[object], size: int = 2) -> list[tuple[int, str]]:
    """Run ``python WORDS...`` in every process of a group; return exit codes and messages.

    They meet at a store of this process, as at torchrun's: a free port that is chosen for the first of them may be
    another process's by the time it has started.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": "none",
        "WORLD_SIZE": str(size),
    }
    started = [processes.start(words, env=group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(size)]
    return [(process.wait(300), process.communicate()[1]) for process in started]
