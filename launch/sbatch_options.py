"""sbatch's own options: which of them submit has words for, and which the environment may set."""

import re
from collections.abc import Mapping

from dist_train.config import ConfigError

# sbatch's name of an option, and submit's for the same.
OWN = {
    "account": "--account",
    "comment": "--comment",
    "constraint": "--constraint",
    "cpus-per-task": "--cpus-per-task",
    "dependency": "--dependency",
    "exclude": "--exclude",
    "gpus": "--gpus-per-node",
    "gpus-per-node": "--gpus-per-node",
    "job-name": "--name",
    "mem": "--mem",
    "nodelist": "--nodelist",
    "nodes": "--nodes",
    "ntasks": "--tasks-per-node",
    "ntasks-per-node": "--tasks-per-node",
    "partition": "--partition",
    "qos": "--qos",
    "reservation": "--reservation",
    "tasks-per-node": "--tasks-per-node",
    "time": "--time",
}
# What a job cannot be given, and what to do instead.
NEVER = {
    "array": "an array is several values of a key, as in seed=1,2,3",
    "chdir": "a job runs in the folder that it is submitted from",
    "error": "errors go where the output goes, below --jobs-dir",
    "gpus-per-task": "it hides a node's other GPUs from a rank: give --gpus-per-node",
    "open-mode": "a job that is requeued adds to its output",
    "output": "the output goes below --jobs-dir, where dist-train logs looks for it",
    "parsable": "dist-train jobs --json is for programs",
    "quiet": "dist-train jobs --json is for programs",
    "signal": "the ranks know when the job's time is over, and save before",
    "test-only": "--dry-run shows the job",
    "wait": "dist-train logs -f JOB waits for the job",
    "wrap": "the job's script is submit's, --setup adds lines to it",
}
SHORT = dict(
    A="account", C="constraint", G="gpus", J="job-name", N="nodes", a="array", c="cpus-per-task"
) | dict(d="dependency", e="error", n="ntasks", o="output", p="partition", q="qos", t="time")
SHORT |= {"w": "nodelist", "x": "exclude"}
# Variables whose option has another name, and options that exclude each other.
OF_VARIABLE = {"ARRAY_INX": "array", "MEM_PER_NODE": "mem", "TIMELIMIT": "time"}
EXCLUDES = {
    "gpus": "gpus-per-node",
    "mem-per-cpu": "mem",
    "mem-per-gpu": "mem",
    "requeue": "no-requeue",
}


def check_sbatch_arg(word: str) -> None:
    """Raise ConfigError for a word of --sbatch-arg that is none, or would lose against submit's."""
    if not re.fullmatch(r"--[a-z][\w-]*(=.*)?", word):
        raise ConfigError(f"--sbatch-arg={word} must have the form --option or --option=value")
    told = _told(word)
    if told is not None:
        raise ConfigError(f"--sbatch-arg={word} is not for sbatch's own words: {told}")


def hint_for(words: list[str], *, is_known: bool) -> str:
    """Return what to type for options of sbatch's among words that submit does not know.

    Args:
        words: they begin with one that submit does not know.
        is_known: what is meant by them is known otherwise, if they are none of sbatch's.
    """
    for word in words:
        if word.startswith("-"):
            own = f"an option of sbatch's own is given as --sbatch-arg={word}; else see --help"
            return _told(word) or ("" if is_known else own)
    return ""


def left_aside(script: str, env: Mapping[str, str]) -> list[str]:
    """Return the variables that would override a script's own lines, as sbatch obeys them more.

    Others, such as SBATCH_ACCOUNT without an --account, are the user's defaults and stay.
    """
    given = set(re.findall(r"^#SBATCH --([\w-]+)", script, re.MULTILINE))
    found = []
    for name in env:
        if name.startswith("SBATCH_"):
            rest = name.removeprefix("SBATCH_")
            option = OF_VARIABLE.get(rest, rest.lower().replace("_", "-"))
            if option in given or option in NEVER or EXCLUDES.get(option) in given:
                found.append(name)
    return sorted(found)


def _told(word: str) -> str | None:
    """Return what to give instead of an option of sbatch's; None: it is not submit's affair."""
    name, _, value = word.lstrip("-").partition("=")
    if not word.startswith("--"):
        name = SHORT.get(name[:1], "")  # -N2, too
    known = OWN | NEVER
    # sbatch takes the beginning of a name, too.
    option = name if name in known else next((k for k in known if name and k.startswith(name)), "")
    if option in OWN:
        return f"give {OWN[option]}{f' {value}' if value else ''} to submit"
    return NEVER.get(option)
