"""Networks that others made, through this toolkit: `make zoo`, or `python -m benchmarks.zoo`.

Each trains two steps on two ranks, is continued for two more by a resume, and must have the weights
of a run of four. A record of each is appended to benchmarks/results/zoo.jsonl; started again, the
command goes on with those that have none. timm's networks are tried if it is installed.
"""

import argparse
import json
import sys

from benchmarks.zoo.networks import Network, networks, version_of
from benchmarks.zoo.table import PAGE, RESULTS, latest, page
from benchmarks.zoo.trial import SAME, attempt
from tests.ranks import FORKSERVER


def main() -> int:
    """Run the command line; returns 1 if a network that was run did not end as it should."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    runs = verbs.add_parser("run", help="try the networks that have not been tried")
    runs.add_argument("names", nargs="*", help="these, also if they have been tried")
    runs.add_argument("--again", action="store_true", help="those that failed, once more")
    runs.add_argument("--source", choices=("torchvision", "timm"), help="only those of one")
    tables = verbs.add_parser("table", help="print what was found")
    tables.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    asked = parser.parse_args()
    if asked.verb == "table":
        return _show(write=asked.write)
    known = [n for n in networks() if asked.source in (None, n.source)]
    wrong = sorted(set(asked.names) - {network.name for network in known})
    if wrong:
        parser.error(f"{', '.join(wrong)}: no such network here (timm: {version_of('timm')})")
    FORKSERVER.set_forkserver_preload(
        ["torch", "torch.distributed", "torchvision", "timm", "dist_train.train"]
    )
    to_do = [n for n in known if _wanted(n, asked.names, again=asked.again)]
    print(f"{len(known)} networks, {len(to_do)} to try", flush=True)
    good = True
    for number, network in enumerate(to_do, 1):
        record = attempt(network)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(record) + "\n")
        good &= record["outcome"] == SAME or record["outcome"].startswith("not run")
        print(
            f"{number}/{len(to_do)} {network.source} {network.name}: {record['outcome']}, "
            f"{record['seconds']:.0f} s {record.get('told', '')}",
            flush=True,
        )
    return 0 if good else 1


def _wanted(network: Network, names: list[str], *, again: bool) -> bool:
    if names:
        return network.name in names
    known = latest().get((network.source, network.name))
    if known is None or known["version"] != version_of(network.source):
        return True
    return again and known["outcome"] != SAME and not known["outcome"].startswith("not run")


def _show(*, write: bool) -> int:
    text = page(list(latest().values()))
    if write:
        PAGE.write_text(text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
