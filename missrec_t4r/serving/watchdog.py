"""A watchdog that ends a server whose owner was killed: a shell that waits for the end of a pipe, nothing more.

The owner holds the other end. However it ends, kill -9 included, the kernel closes the pipe; the shell then stops the
server's process group, politely first, and removes its temporary folder. `PR_SET_PDEATHSIG` would be shorter, but it
follows the *thread* that started the server: one started from a worker thread would die with that thread.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

_SCRIPT = """
read -r word
[ "$word" = done ] && exit 0
kill -TERM -"$1" 2>/dev/null
for _ in 1 2 3 4 5 6 7 8 9 10; do kill -0 -"$1" 2>/dev/null || break; sleep 1; done
kill -KILL -"$1" 2>/dev/null
rm -rf -- "$2"
"""


def start_watchdog(group: int, folder: Path) -> subprocess.Popen[bytes]:
    r"""Watch over a process group.

    Parameters
    ----------
    group : int
        Process group to stop when this process is gone.
    folder : Path
        Removed then.

    Returns
    -------
    Popen
        ``communicate(b"done\n")`` ends it when there is nothing left to watch.
    """
    return subprocess.Popen(
        ["/bin/sh", "-c", _SCRIPT, "missrec-watchdog", str(group), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a signal to the owner's whole group must not reach it
    )
