"""Imports point down: config < ranks and order < parts < what puts them together < train."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A unit is a file of dist_train, or a folder of it; it may import the units of the levels before
# its own. A new file gets its place here.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("__init__",),
    ("config",),
    ("slurm_step",),
    (
        "cgroups",
        "checkpoint_folder",
        "copies",
        "fitting",
        "heartbeat",
        "imported_code",
        "interface",
        "journal",
        "layout",
        "order",
        "preemption",
        "progress",
        "save_period",
        "torchrun_here",
    ),
    (
        "chain",
        "checkpoint_upkeep",
        "device",
        "launch_store",
        "memory_format",
        "monitor",
        "state_file",
    ),
    ("chain_status", "rendezvous", "torchrun_store"),
    ("agent", "buffers", "distributed", "memory", "muon", "own_memory", "plain_state", "plan"),
    ("broken_device", "ddp", "gradients", "pinned", "weights"),
    ("ddp_check", "nonfinite", "optim", "parallel", "step_failure"),
    (
        "attribution",
        "checkpoint",
        "data",
        "metrics",
        "models",
        "profiling",
        "recovery",
        "tasks",
        "tracking",
        "wandb_tracker",
    ),
    ("build", "drift", "failure", "sync_form"),
    ("checkpoint_writer", "resumable", "run_folder", "smallest", "state", "watchdog"),
    ("checkpoint_tool", "saves", "summary"),
    ("saved_states",),
    ("run",),
    ("endings", "trial"),
    ("claim", "evaluation", "rollback", "start", "step"),
    ("train",),
    ("bench", "differences", "doctor", "dry_run", "replay"),
    ("__main__",),
    ("rehearsal",),
    ("verify_resume",),
)
# Within a level: who may import whom, and why.
EDGES = {
    ("tracking", "wandb_tracker"): "the file of one of its trackers",
    ("tasks", "data"): "data.batch: what a loss is computed on",
    ("attribution", "data"): "data.batch: what is run again",
}
# Inside a function: where and what; torch or an optional package is not loaded without need.
LATE = {
    ("dist_train/__main__.py", "dist_train.chain_status"),
    ("dist_train/__main__.py", "dist_train.config"),
    ("dist_train/__main__.py", "dist_train.config.arguments"),
    ("dist_train/__main__.py", "dist_train.config.redact"),
    ("dist_train/__main__.py", "dist_train.distributed"),
    ("dist_train/__main__.py", "dist_train.dry_run"),
    ("dist_train/__main__.py", "dist_train.step_failure"),
    ("dist_train/__main__.py", "dist_train.saves"),
    ("dist_train/__main__.py", "dist_train.endings"),
    ("dist_train/__main__.py", "dist_train.launch_store"),
    ("dist_train/__main__.py", "dist_train.torchrun_store"),
    ("dist_train/__main__.py", "dist_train.train"),
    ("dist_train/build.py", "torch._dynamo"),  # only to compile a model
    ("dist_train/build.py", "torch._dynamo.callback"),
    ("dist_train/ddp_check.py", "torch._dynamo"),  # what DDP imports anyway: not on its clock
    ("dist_train/agent.py", "torch.distributed"),  # after it has begun to listen
    ("dist_train/agent.py", "torch.distributed.elastic.multiprocessing"),
    ("dist_train/agent.py", "torch.distributed.elastic.multiprocessing.errors"),
    ("dist_train/doctor/arrival.py", "dist_train.doctor"),  # torch may be what is broken
    ("dist_train/doctor/examination.py", "dist_train.doctor"),
    ("dist_train/bench/page.py", "matplotlib"),
    ("dist_train/bench/page.py", "matplotlib.figure"),
    ("dist_train/bench/page.py", "matplotlib.ticker"),
    # torchvision takes half a second and more to import, and most runs need none of it
    ("dist_train/data/cifar10.py", "torchvision.datasets.utils"),
    ("dist_train/data/worker_dataset.py", "torchvision.transforms"),
    ("dist_train/models/resnet18.py", "torchvision.models.resnet"),
    ("dist_train/tracking.py", "torch.utils.tensorboard"),
    ("dist_train/wandb_tracker.py", "wandb"),
    ("launch/cli.py", "dist_train"),  # the version
    ("launch/payload.py", "launch.batch"),  # in the job
    ("launch/submission.py", "submitit.slurm.slurm"),
}
# dist_train's own that the launcher may import: none of them imports torch.
OF_LAUNCH = (
    "dist_train",
    "dist_train.chain_status",
    "dist_train.config",
    "dist_train.layout",
    "dist_train.preemption",
    "dist_train.slurm_step",
    "dist_train.torchrun_here",
)
WITHOUT_TORCH = (
    "launch.cli",
    "launch.local",
    "dist_train.checkpoint_tool",
    "dist_train.config.arguments",
    "dist_train.agent",
    "dist_train.chain",
    "dist_train.chain_status",
    "dist_train.doctor.main",
    "dist_train.layout",
    "dist_train.preemption",
    "launch.cancel",
    "launch.job_record",
    "launch.jobs",
    "launch.logs",
    "launch.payload",
    "launch.requeue",
    "launch.submit",
    "launch.supervise",
    "launch.batch",
    "launch.sbatch_options",
    "launch.scontrol",
    "launch.this_job",
    "dist_train.slurm_step",
    "dist_train.monitor.main",
)

FILES = sorted(
    path.relative_to(ROOT)
    for top in ("dist_train", "launch")
    for path in (ROOT / top).rglob("*.py")
)


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield every module that is imported, one name for each."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, "no relative imports"
            yield node.module


def imports_of(path: Path) -> list[str]:
    return list(imports(ast.parse((ROOT / path).read_text())))


def late_imports_of(path: Path) -> set[str]:
    """Return what the functions of a file import."""
    tree = ast.parse((ROOT / path).read_text())
    functions = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return {module for function in functions for module in imports(function)}


def unit_of(module: str) -> str:
    """Return the unit of a module of dist_train."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def level_of(unit: str) -> int:
    found = [number for number, units in enumerate(LEVELS) if unit in units]
    assert found, f"dist_train/{unit} has no place in LEVELS of {Path(__file__).name}: give it one"
    return found[0]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_down(path: Path) -> None:
    if path.parts[0] == "launch":
        foreign = [m for m in imports_of(path) if m.split(".")[0] == "dist_train"]
        assert not [m for m in foreign if not _is_below(m, OF_LAUNCH)]
        return
    mine = unit_of(".".join(path.with_suffix("").parts))
    for module in imports_of(path):
        assert module.split(".")[0] != "launch", f"{path} imports {module}"
        if module.split(".")[0] != "dist_train":
            continue
        theirs = unit_of(module)
        allowed = mine == theirs or level_of(theirs) < level_of(mine) or (mine, theirs) in EDGES
        assert allowed, f"{path} imports {module}: not below it in LEVELS, and not one of EDGES"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_only_listed_imports_are_inside_functions(path: Path) -> None:
    assert late_imports_of(path) == {module for file, module in LATE if file == str(path)}


def test_the_lists_hold_nothing_that_is_gone() -> None:
    units = {
        unit_of(".".join(path.with_suffix("").parts)) for path in FILES if path.parts[0] != "launch"
    }
    assert {unit for level in LEVELS for unit in level} == units
    found = {
        (unit_of(".".join(path.with_suffix("").parts)), unit_of(module))
        for path in FILES
        for module in imports_of(path)
        if path.parts[0] == module.split(".")[0] == "dist_train"
    }
    assert set(EDGES) <= found


def test_no_torch_before_the_ranks_start() -> None:
    code = f"import sys, {', '.join(WITHOUT_TORCH)}; print(sorted(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    modules = ast.literal_eval(found.stdout)
    assert not {"torch", "torchvision", "numpy"} & set(modules)


def _is_below(module: str, allowed: tuple[str, ...]) -> bool:
    return module == "dist_train" or any(
        module == name or module.startswith(f"{name}.") for name in allowed if "." in name
    )


@pytest.mark.slow
def test_a_training_starts_without_torchvision() -> None:
    code = "import sys, dist_train.train; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    heavy = {"torchvision", "torch._dynamo", "wandb", "tensorboard", "matplotlib"}
    assert not heavy & set(done.stdout.split())
