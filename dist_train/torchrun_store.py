"""Where rank 0's store is when torchruns have met again after one of them had died.

A torchrun keeps the address of its first round: one that was started again would wait for rank 0's
address in vain, or the others would look for it where the dead one was. What a round must know is
in the store at --rdzv-endpoint: rank 0 writes it there, and the others read it.
"""

import base64
import dataclasses
import os
import pickle
from collections.abc import Mapping
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo

from dist_train.layout import Layout, word_of_torchrun

DEFAULT_PORT = 29400  # of torchrun's c10d backend
ANSWER_SEC = 30.0
# What says that torchrun's store is not there, or not as it is known here.
UNKNOWN = (RuntimeError, ValueError, AttributeError, KeyError)


def with_address_of_round(layout: Layout, env: Mapping[str, str]) -> Layout:
    """Return the layout with the address that holds for this round of torchruns.

    Only where it can differ from torchrun's word: on several machines. How many rounds there were
    torchrun does not tell: it does not count those that another machine asked for.
    """
    if not _meets_in_rounds(env):
        return layout
    try:
        place = _round(env, later=0)
        if layout.rank == 0:
            _tell(place, env)
            return layout
        address = place.get(RendezvousStoreInfo.MASTER_ADDR_KEY).decode()
        port = int(place.get(RendezvousStoreInfo.MASTER_PORT_KEY).decode())
    except UNKNOWN:  # torchrun's own word is what is left
        return layout
    return dataclasses.replace(layout, master_addr=address, master_port=port)


def tell_next_round(env: Mapping[str, str]) -> None:
    """Let a torchrun that is started instead of a dead one find rank 0, if that lives. On rank 0.

    Its own torchrun will not tell: it has done so in its first round.
    """
    if env.get("RANK") == "0" and _meets_in_rounds(env):
        try:
            _tell(_round(env, later=1), env)
        except UNKNOWN:  # it has died, too
            return


def _meets_in_rounds(env: Mapping[str, str]) -> bool:
    served = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    several = env.get("LOCAL_WORLD_SIZE") != env.get("WORLD_SIZE")
    return served and several and word_of_torchrun("rdzv-backend", os.getppid(), env) == "c10d"


def _round(env: Mapping[str, str], *, later: int) -> Store:
    """Return the part of torchrun's store that belongs to this round, or to a later one."""
    host, _, port = word_of_torchrun("rdzv-endpoint", os.getppid(), env).partition(":")
    wait = timedelta(seconds=ANSWER_SEC)
    store = TCPStore(host, int(port or DEFAULT_PORT), is_master=False, timeout=wait)
    name = f"torch.rendezvous.{env['TORCHELASTIC_RUN_ID']}"  # as torchrun calls it
    number = pickle.loads(base64.b64decode(store.get(name))).round
    return PrefixStore(f"{name}.{number + later}", store)


def _tell(place: Store, env: Mapping[str, str]) -> None:
    place.set(RendezvousStoreInfo.MASTER_PORT_KEY, env["MASTER_PORT"])
    place.set(RendezvousStoreInfo.MASTER_ADDR_KEY, env["MASTER_ADDR"])
