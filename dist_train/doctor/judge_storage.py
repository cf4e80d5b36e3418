"""Decide whether the run folder's file system can hold a run. Pure functions."""

import errno

from dist_train.doctor.finding import Section, listed, size_of, time_of
from dist_train.doctor.storage import VISIBLE_SEC, Disk, View

SLOW_SYNC_SEC = 0.1
SLOW_BYTES_PER_SEC = 30e6  # a checkpoint of 1 GB would take half a minute
SEEN_LATE_SEC = 2.0
CHECKPOINTS = 4  # three that are kept, and the one that is being written
LITTLE_BYTES, FEW_FILES = 2 << 30, 1000
DANGER = "two jobs could write into one run: put run_dir on a file system with locks"


def judge_storage(
    disk: Disk | None, views: list[View], nodes: list[str], folder_error: str | None
) -> Section:
    """Does the file system keep what a run relies on?"""
    section = Section(title="file system of the run folder")
    if disk is None:
        why = folder_error or "rank 0 did not come so far"
        section.error(f"rank 0's node cannot use the run folder ({why}): set another --run-dir")
        return section
    section.lines.append(
        f"{disk.folder}: {disk.kind}, {size_of(disk.free_bytes)} free of "
        f"{size_of(disk.total_bytes)}"
    )
    _space(section, disk)
    if disk.lock_error:
        section.error(f"{disk.folder} refuses locks ({disk.lock_error}), so that {DANGER}")
    if disk.error:
        section.unchecked("locks, renames and speed: the folder cannot be written to")
        return section
    written = disk.written_bytes / disk.write_sec
    section.lines.append(f"write {size_of(written)}/s, sync {time_of(disk.sync_sec)}")
    if written < SLOW_BYTES_PER_SEC:
        section.warning(
            f"{disk.folder} takes {size_of(written)}/s: saves are slow, use a faster file system"
        )
    if disk.sync_sec > SLOW_SYNC_SEC:
        section.warning(
            f"a sync of 4 KiB takes {time_of(disk.sync_sec)} in {disk.folder}, and each save does "
            "several: use another file system, or save less often"
        )
    _same(section, disk, views, nodes)
    if not disk.lock_error:
        _locks(section, disk, views)
    for view in views:
        _seen(section, disk, view)
    return section.fine_if_nothing("it keeps locks, replaces files whole, and has space")


def _space(section: Section, disk: Disk) -> None:
    needed = CHECKPOINTS * disk.checkpoint_bytes
    free = f"{size_of(disk.free_bytes)} free of {size_of(disk.total_bytes)}"
    if disk.errno in (errno.ENOSPC, errno.EDQUOT):
        section.error(
            f"the disk of {disk.folder} is full ({disk.error}: {free}, room for "
            f"{disk.free_files} files): delete something, or set another run_dir"
        )
    elif disk.error:
        section.error(f"{disk.folder} cannot be written to ({disk.error}): set another run_dir")
    elif disk.free_bytes < needed:
        section.error(
            f"{disk.folder} has {free}, and {CHECKPOINTS} checkpoints of "
            f"{size_of(disk.checkpoint_bytes)} need {size_of(needed)}: delete something, or lower "
            "checkpoint.keep_last"
        )
    elif not needed and disk.free_bytes < LITTLE_BYTES:
        section.warning(
            f"{disk.folder} has {free}: a run keeps {CHECKPOINTS} checkpoints at a time, of three "
            "times the weights or more each"
        )
    if disk.num_files and disk.free_files < FEW_FILES and not disk.error:
        section.warning(f"{disk.folder} has room for {disk.free_files} files only: delete some")


def _same(section: Section, disk: Disk, views: list[View], nodes: list[str]) -> None:
    elsewhere = [view.node for view in views if not view.is_same]
    if elsewhere:
        section.warning(
            f"{disk.folder} is another folder on {listed(elsewhere)}: only rank 0 writes, so "
            "training works, but a requeued job with another first node would start anew; let "
            "run_dir be on a file system that all nodes see"
        )
    unseen = [node for node in nodes if node not in {view.node for view in views}]
    if unseen:
        section.unchecked(f"what {listed(unseen)} sees of it: no word of it came")


def _locks(section: Section, disk: Disk, views: list[View]) -> None:
    got = [view.node for view in views if view.got_lock]
    who = "another process of the same node" if disk.neighbour_got_lock else listed(got)
    if disk.neighbour_got_lock or got:
        section.error(
            f"a lock in {disk.folder} does not keep out {who}, so that {DANGER} (NFS: without "
            "nolock and local_lock; Lustre: flock, not localflock)"
        )
    for view in views:
        if view.lock_error:
            section.error(f"{view.node} is refused locks in {disk.folder} ({view.lock_error})")
    if not any(view.got_lock is not None for view in views):
        section.unchecked("locks between nodes: no other node looked")


def _seen(section: Section, disk: Disk, view: View) -> None:
    if not view.is_same:
        return
    if view.error:
        section.error(f"{view.node} cannot read {disk.folder} ({view.error}): mend its mount there")
        return
    if view.torn or view.gone:
        section.error(
            f"{view.node} saw a file that is replaced by rename torn {view.torn} and missing "
            f"{view.gone} times of {view.reads}: a checkpoint would be, too; set another run_dir"
        )
    if view.stale:
        section.note(f"{view.stale} of {view.reads} reads were stale on {view.node} (NFS)")
    waited = view.seen_after_sec if view.seen_after_sec is not None else VISIBLE_SEC
    if waited > SEEN_LATE_SEC:
        section.warning(
            f"{view.node} did not see rank 0's new file for {waited:.1f} s: NFS caches names "
            "(acregmin, lookupcache); a job that follows at once may miss the newest checkpoint"
        )
    speed = view.read_bytes_per_sec
    if speed is not None and speed < SLOW_BYTES_PER_SEC:
        section.warning(
            f"{view.node} reads {size_of(speed)}/s from {disk.folder}: restores are slow there, "
            "look at its mount"
        )
