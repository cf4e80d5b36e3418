"""Refuse a YAML file that would be huge once it is read, before it is read."""

from collections.abc import Iterator
from pathlib import Path

import yaml

from dist_train.config.schema import ConfigError

MAX_BYTES = 256 << 10
MAX_NODES = 10_000  # after every alias is replaced by what it stands for; our own files have 200
MAX_DEPTH = 50
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_yaml(path: Path, what: str) -> None:
    """Walk the events of a file; nothing of it is built.

    Nested anchors of a few lines ("billion laughs") stand for more values than any memory holds.

    Args:
        path: the file.
        what: how the user named it, such as "--config x.yaml".

    Raises:
        ConfigError: it is too long, too deep, or stands for too many values.
        OSError: it cannot be read.
        yaml.YAMLError: it is no YAML.
    """
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ConfigError(
            f"{what} is longer than {MAX_BYTES >> 10} KiB: no file of settings is; give that of a "
            "run, its config.yaml"
        )
    too_large = ConfigError(
        f"{what} stands for more than {MAX_NODES} values or {MAX_DEPTH} levels once its "
        "aliases (*name) are replaced: write out the values that are settings"
    )
    try:
        for nodes, depth in _growth(yaml.parse(data, Loader=_LOADER)):
            if nodes > MAX_NODES or depth > MAX_DEPTH:
                raise too_large
    except yaml.YAMLError as error:
        if "nesting depth" in str(error):  # newer releases of libyaml have a limit of their own
            raise too_large from None
        raise


def _growth(events: Iterator[yaml.Event]) -> Iterator[tuple[int, int]]:
    """Yield (nodes so far, depth) at each event, an alias counted as all that it stands for."""
    sizes: dict[str, int] = {}  # of what each anchor stands for
    open_nodes: list[tuple[str | None, int]] = []  # anchor, nodes before it
    nodes = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            # One that is still open holds itself: without end.
            nodes += sizes.get(event.anchor, MAX_NODES + 1)
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, nodes))
            nodes += 1
            if event.anchor is not None:
                sizes.pop(event.anchor, None)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = nodes - before
        yield nodes, len(open_nodes)
