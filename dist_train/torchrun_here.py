"""How to start torchrun on this machine alone: at 127.0.0.1, whatever else is in the environment.

Imports no torch.
"""

from collections.abc import Mapping

# torchrun takes PET_NAME for an option --name that the command does not give. What says how many
# ranks there are, where they meet and what they run is the command's business alone.
OF_THE_COMMAND = (
    "NNODES",
    "NPROC_PER_NODE",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "STANDALONE",
    "RDZV_BACKEND",
    "RDZV_ENDPOINT",
    "RDZV_ID",
    "MAX_RESTARTS",
    "MODULE",
    "NO_PYTHON",
    "RUN_PATH",
)
OF_ONE_MACHINE = ("RDZV_CONF", "LOCAL_ADDR")  # on several they may be needed
ALONE = ("--standalone", "--local-addr=127.0.0.1")  # its own name may not resolve


def without_leftovers(env: Mapping[str, str], *, num_nodes: int) -> dict[str, str]:
    """Return an environment from which torchrun takes nothing that its command line contradicts."""
    dropped = {f"PET_{name}" for name in OF_THE_COMMAND}
    if num_nodes == 1:
        dropped |= {f"PET_{name}" for name in OF_ONE_MACHINE}
    return {name: value for name, value in env.items() if name not in dropped}


def leftovers(env: Mapping[str, str], *, num_nodes: int, num_local_ranks: int) -> str | None:
    """Return a line on what is ignored and says another thing than the command; None: nothing."""
    same = {
        "PET_NNODES": {str(num_nodes), f"{num_nodes}:{num_nodes}"},
        "PET_NPROC_PER_NODE": {str(num_local_ranks), "auto", "gpu"},
        "PET_NODE_RANK": {"0"} if num_nodes == 1 else set(),
    }
    kept = without_leftovers(env, num_nodes=num_nodes)
    told = [
        f"{name}={value}"
        for name, value in sorted(env.items())
        if name not in kept and name != "PET_MAX_RESTARTS" and value not in same.get(name, ())
    ]
    if not told:
        return None
    shape = f"{num_local_ranks} ranks on this machine"
    if num_nodes > 1:
        shape = f"{num_local_ranks} ranks on each of {num_nodes} machines"
    return (
        f"{', '.join(told)} of the environment is ignored: the command is for {shape}; for "
        "others give --nproc, --nnodes and --rdzv-endpoint"
    )
