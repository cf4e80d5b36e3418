"""`dist-train submit`: check the command, hand it to SLURM as a job, say how to follow it."""

import argparse
import dataclasses
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from dist_train.config import Config, ConfigError
from dist_train.config.arguments import Parser, add_run_options, compose_request, print_error
from dist_train.config.check import check_world
from dist_train.config.identity import name_of
from dist_train.config.redact import redact_words
from launch.job_record import JOBS_DIR, GitState, JobRecord, write_record
from launch.job_settings import JobSettings, add_job_options, settings_of
from launch.payload import Payload
from launch.sbatch_options import hint_for, left_aside
from launch.submission import Submission, script_of, start_command, submit
from launch.submitted_code import Snapshot, git_states
from launch.sweep import Element, elements_of

CHAIN_VARIABLE = "DIST_TRAIN_CHAIN"
LEFT_ASIDE = "Left aside, as the lines above hold"  # variables of the environment
FIRST_JOB, JOB_BEFORE = "FIRST_JOB", "JOB_BEFORE"  # ids in a dry run


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is submitted, but for the ids that SLURM gives."""

    name: str
    settings: JobSettings
    elements: list[Element]
    jobs_dir: Path
    chain: int  # jobs, one after the other
    git: tuple[GitState, ...]
    snapshot: Snapshot | None

    def submission(self, first: str = "", before: str = "") -> Submission:
        """Return the first job of the chain, or one that follows `before`."""
        environment = {} if self.snapshot is None else self.snapshot.environment(os.environ)
        if first:
            environment[CHAIN_VARIABLE] = f"slurm-{first}"
        start = start_command(self.settings)
        return Submission(
            name=self.name,
            settings=self.settings,
            jobs_dir=self.jobs_dir,
            environment=tuple(environment.items()),
            dependency=f"afterany:{before}" if before else None,
            payloads=tuple(
                Payload(
                    start=start,
                    words=element.words,
                    jobs_dir=str(self.jobs_dir.absolute()),
                    git=() if self.snapshot is not None else self.git,
                )
                for element in self.elements
            ),
        )


def main(argv: list[str]) -> int:
    """Run `dist-train submit`; returns 0 submitted, 2 the user's mistake or SLURM's refusal."""
    try:
        options = _parse(argv)
        plan = _plan(options)
        if options.print_config:
            sys.stdout.write(_settings_of_the_run(options, plan) + "\n")
        elif options.dry_run:
            sys.stdout.write("".join(_dry_run(plan)))
        else:
            if plan.snapshot is not None:
                plan.snapshot.take()
            for records in _submit(plan):
                sys.stdout.write(_report(records, plan))
                sys.stdout.flush()
    except ConfigError as mistake:
        print_error(str(mistake))
        return 2
    except OSError as error:
        print_error(f"the job's files cannot be written ({error}): choose another --jobs-dir")
        return 2
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="dist-train submit",
        description="Submit a training to SLURM; several values of a key make an array of jobs.",
    )
    add_run_options(parser)
    parser.add_argument("--name", help="of the job; the experiment's, if not given")
    parser.add_argument(
        "--chain",
        type=int,
        default=1,
        metavar="N",
        help="N jobs, each continues the one before it: where SLURM may not requeue a job",
    )
    parser.add_argument(
        "--snapshot", action="store_true", help="run a copy of the files that git lists now"
    )
    parser.add_argument(
        "--jobs-dir", type=Path, default=JOBS_DIR, help="where scripts, output and records go"
    )
    add_job_options(parser)
    try:
        return parser.parse_intermixed_args(argv)
    except ConfigError as mistake:
        begin, _, rest = str(mistake).partition("unrecognized arguments: ")
        unknown, _, meant = rest.partition(": ")
        hint = hint_for(unknown.split(), is_known=meant != "see --help")
        if begin or not hint:
            raise
        raise ConfigError(f"unrecognized arguments: {unknown}: {hint}") from None


def _plan(options: argparse.Namespace) -> Plan:
    """Compose and check all that is asked for. Raises ConfigError."""
    elements = elements_of(options)
    settings = settings_of(options)
    for element in elements:
        _check_ranks(element.config, settings)
    if options.chain < 1:
        raise ConfigError(f"--chain={options.chain} is out of range: give 1 or more jobs")
    if options.chain > 1 and len(elements) > 1:
        raise ConfigError(
            f"--chain={options.chain} continues one run, this is a sweep of {len(elements)}: "
            "submit each of them, or leave --chain out"
        )
    if options.array_parallelism is not None and len(elements) == 1:
        raise ConfigError(
            f"--array-parallelism={options.array_parallelism} is for a sweep, how many of its runs "
            "go on at a time, and this is one run: give several values (seed=1,2), or leave it out"
        )
    snapshot = Snapshot(options.jobs_dir) if options.snapshot else None
    if snapshot is not None:
        elements = [_with_copies(element, options, snapshot) for element in elements]
    return Plan(
        name=options.name or "+".join(dict.fromkeys(name_of(e.config) for e in elements)),
        settings=settings,
        elements=elements,
        jobs_dir=options.jobs_dir,
        chain=options.chain,
        git=git_states(options.jobs_dir),
        snapshot=snapshot,
    )


def _check_ranks(config: Config, settings: JobSettings) -> None:
    """Raise ConfigError if these ranks could not train this on one of the numbers of nodes."""
    for nodes in settings.node_counts:
        check_world(config, nodes * settings.ranks_per_node)
    if config.device == "cuda" and settings.gpus == 0:
        raise ConfigError("device=cuda needs GPUs: ask for them with --gpus-per-node N")


def _with_copies(element: Element, options: argparse.Namespace, snapshot: Snapshot) -> Element:
    """Let the ranks read --config and --config-dir from the snapshot, if they are in it."""
    words = list(element.words)
    for option, path in (("--config", options.config), ("--config-dir", options.config_dir)):
        copy = None if path is None else snapshot.copy_of(path)
        if copy is not None:
            words[words.index(option) + 1] = str(copy)
    return dataclasses.replace(element, words=tuple(words))


def _settings_of_the_run(options: argparse.Namespace, plan: Plan) -> str:
    if len(plan.elements) > 1:
        raise ConfigError("--print-config shows one run: give one value for each setting")
    return compose_request(options).text or ""


def _dry_run(plan: Plan) -> Iterator[str]:
    """Yield what sbatch would be given, and in comments what its command starts."""
    first = plan.submission()
    yield script_of(first)
    yield "\n# On the job's first node this starts the ranks:\n"
    for number, (element, payload) in enumerate(zip(plan.elements, first.payloads, strict=True)):
        line = shlex.join([*payload.start, *redact_words(payload.words)])
        yield f"# {f'[{number}] ' if first.is_array else ''}{line}\n"
        yield f"#   run folder: {element.run_dir}\n"
    variables = left_aside(script_of(first), os.environ)
    if variables:
        yield f"\n# {LEFT_ASIDE}: {', '.join(variables)}\n"
    if plan.chain > 1:
        yield f"\n# Then jobs 2 to {plan.chain} of the chain:\n"
        yield script_of(plan.submission(FIRST_JOB, JOB_BEFORE))


def _submit(plan: Plan) -> Iterator[list[JobRecord]]:
    """Submit the jobs, and yield what is remembered of each, or of an array's elements."""
    first = before = ""
    for _ in range(plan.chain):
        submission = plan.submission(first, before)
        try:
            ids = submit(submission)
        except ConfigError as refusal:
            if not first:
                raise
            raise ConfigError(f"the chain ends with job {before}: {refusal}") from None
        first, before = first or ids[0], ids[0]
        records = [
            JobRecord(
                job_id=job_id,
                name=plan.name,
                run_dir=str(element.run_dir),
                words=element.words,
                command="submit",
                cwd=str(Path.cwd()),
                output=_output(submission, job_id),
                git=plan.git,
                snapshot=None if plan.snapshot is None else str(plan.snapshot.folder),
                overrides=element.overrides,
                chain=first if plan.chain > 1 else "",
            )
            for job_id, element in zip(ids, plan.elements, strict=True)
        ]
        for record in records:
            write_record(plan.jobs_dir, record)
        yield records


def _output(submission: Submission, job_id: str) -> str:
    job, _, index = job_id.partition("_")
    return submission.output.replace("%j", job_id).replace("%A", job).replace("%a", index)


def _report(records: list[JobRecord], plan: Plan) -> str:
    """Return what the user needs to follow a job."""
    first = records[0]
    job = first.job_id.partition("_")[0]
    if first.chain not in ("", job):
        return f"job          {job}, which continues it after that\n"
    rows = [("job", job)]
    if len(records) > 1:
        limit = plan.settings.array_parallelism or len(records)
        rows = [("job", f"{job}, an array of {len(records)}, at most {limit} at a time")]
    for record in records:
        apart = f"  ({record.job_id}: {' '.join(record.overrides)})" if record.overrides else ""
        rows.append(("run folder", f"{record.run_dir}{apart}"))
    output = first.output if len(records) == 1 else first.output.replace("_0.out", "_*.out")
    rows.append(("output", os.path.relpath(output)))
    if plan.snapshot is not None:
        rows.append(("code", os.path.relpath(plan.snapshot.folder)))
    variables = left_aside(script_of(plan.submission()), os.environ)
    if variables:
        rows.append(("left aside", f"{', '.join(variables)}: submit's own options hold"))
    where = [] if plan.jobs_dir == JOBS_DIR else ["--jobs-dir", str(plan.jobs_dir)]
    one = first.job_id
    for verb in (["jobs", job], ["logs", "-f", one], ["cancel", job]):
        rows.append(("follow it", shlex.join(["dist-train", *verb, *where])))
    lines = []
    for number, (label, text) in enumerate(rows):
        shown = label if number == 0 or rows[number - 1][0] != label else ""
        lines.append(f"{shown:<12} {text}\n")
    return "".join(lines)
