"""How the ranks that torchrun starts find each other, also after a worker has died and all were started again.

torchrun keeps one store as long as it lives, with the addresses of workers that are dead, and every machine's torchrun
counts restarts by itself (pytorch/pytorch#108158, #135712): neither tells which attempt this is.
"""

import os
import time
import uuid
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

LOOK_SECONDS = 0.1  # between two reads of the store; asleep, a rank can still be stopped by a signal


def is_main_rank() -> bool:
    """Returns whether this process is the first of torchrun's, or the only one; known before they have met."""
    return os.environ.get("RANK", "0") == "0"


def rendezvous(store: "Store", rank: int, num_ranks: int) -> str:
    """Returns a name that the ranks of this attempt share and those of no other know.

    torchrun starts no rank before all of the attempt before are dead, so whoever answers lives.
    """
    if not _torchrun_keeps_store():
        return ""
    me = uuid.uuid4().hex
    if rank == 0:
        store.set("first", me)
        for other in range(1, num_ranks):
            while not store.check([f"{me}/{other}"]):
                time.sleep(LOOK_SECONDS)
            theirs = store.get(f"{me}/{other}").decode()
            store.set(f"{me}/{other}/{theirs}", "seen")
        return me
    first = ""
    while not (first and store.check([f"{first}/{rank}/{me}"])):
        first = store.get("first").decode()  # perhaps a dead one, which will not answer
        store.set(f"{first}/{rank}", me)
        time.sleep(LOOK_SECONDS)
    return first


def is_restart(store: "Store", rank: int) -> bool:
    """Returns whether torchrun has started this rank before: a worker died somewhere, and all start again.

    To be asked once by each worker, before it meets the others: no run folder is made before all have been asked, so
    they agree on whether a folder is theirs.
    """
    if not _torchrun_keeps_store():
        return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return bool(store.add(f"started/{rank}", 1) > 1)


def _torchrun_keeps_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
