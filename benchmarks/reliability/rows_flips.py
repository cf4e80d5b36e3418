"""Rows D3 to D6: bits that flip in one replica, and losses that jump."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.reliability.clean import events_of
from benchmarks.reliability.faults_inside import around_step
from benchmarks.reliability.in_ranks import how_it_ended, trained
from benchmarks.reliability.row import Row, Trial, check
from tests.nets import noisy_net
from tests.settings import small
from tests.test_rollback import SETTINGS, Flip, spoil

WORDS = SETTINGS
STEPS, WORLD, BITS = 24, 3, 32
NOTICES = ("rolled_back", "skipped_step", "loss_spike")
STATES = ("momentum", "average", "buffer", "random state")
PARAMETERS = tuple((name, p.numel()) for name, p in noisy_net(10).named_parameters())
BUFFERS = tuple((n, b.numel()) for n, b in noisy_net(10).named_buffers() if b.is_floating_point())


@dataclass(frozen=True, kw_only=True, slots=True)
class Corrupt:
    """Do `spoil(parts)` before one step, the first time that it comes."""

    rank: int
    step: int
    spoil: Callable[[Any], None]
    mark: str

    def arm(self, stack: ExitStack) -> None:
        """Patch the loop."""

        def work(parts: Any, step: int, take: Callable[[], Any]) -> Any:
            if step == self.step and not Path(self.mark).exists():
                Path(self.mark).touch()
                self.spoil(parts)
            return take()

        around_step(stack, work)


@dataclass(frozen=True, kw_only=True, slots=True)
class FlipBuffer:
    """Flip one bit of a float32 buffer."""

    name: str
    place: int
    bit: int

    def __call__(self, parts: Any) -> None:
        _flip(dict(parts.replica.module.named_buffers())[self.name], self.place, self.bit)


@dataclass(frozen=True, kw_only=True, slots=True)
class FlipRandomState:
    """Flip one bit of torch's state of random numbers: what dropout draws from."""

    place: int
    bit: int

    def __call__(self, parts: Any) -> None:
        state = torch.get_rng_state()
        state[24 + self.place] ^= 1 << self.bit  # behind the head: a word of the Mersenne twister
        torch.set_rng_state(state)


@dataclass(frozen=True, kw_only=True, slots=True)
class FlipGradient:
    """Flip one bit of a parameter's gradient in the next backward, before the all-reduce."""

    name: str
    place: int
    bit: int

    def __call__(self, parts: Any) -> None:
        def flip(gradient: torch.Tensor) -> torch.Tensor:
            handle.remove()
            flipped = gradient.contiguous().clone()
            _flip(flipped, self.place, self.bit)
            return flipped

        handle = dict(parts.replica.module.named_parameters())[self.name].register_hook(flip)


def _flip(tensor: torch.Tensor, place: int, bit: int) -> None:
    word = tensor.view(-1)[place : place + 1].view(torch.int32)
    word ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)


def _run(trial: Trial, do: Callable[[Any], None], *words: str) -> tuple[float, int]:
    """Train with the corruption; returns when it happened and at which step."""
    rank, step = trial.dice.randrange(WORLD), trial.dice.randrange(1, STEPS)
    trial.notes |= {"rank": rank, "step": step}
    mark = trial.folder / "fired"
    fault = Corrupt(rank=rank, step=step, spoil=do, mark=str(mark))
    config = small(trial.folder / "run", *WORDS, *words)
    ends = trained(trial.folder, config, fault, world_size=WORLD)
    trial.fired = mark.exists()
    check(all(o.error is None for o in ends), how_it_ended(ends, trial.folder))
    return mark.stat().st_mtime, step


def _found_or_healed(trial: Trial, when: float) -> float | None:
    """Check the bits of the end and who was blamed; returns the seconds to the finding."""
    run = trial.folder / "run"
    difference = trial.clean.difference(run, WORLD, WORDS)
    back = events_of(run, "rolled_back")
    trial.notes["found"] = bool(back)
    check(difference is None, f"{'found' if back else 'not found'}, and {difference}")
    if not back:
        return None  # all numbers that it could reach are those of the undisturbed run
    wanted = f"rank {trial.notes['rank']} against {WORLD - 1} others"
    check(wanted in back[0]["reason"], f"blamed {back[0]['reason']}")
    return back[0]["time"] - when


def d3(trial: Trial) -> float | None:
    """One bit of one parameter of one rank: the 32 bits in turn."""
    (name, size), bit = trial.dice.choice(PARAMETERS), trial.seed % BITS
    trial.notes |= {"tensor": name, "bit": bit}
    when, _ = _run(trial, Flip("parameter", name, bit, trial.dice.randrange(size)))
    return _found_or_healed(trial, when)


def d4(trial: Trial) -> float | None:
    """One bit of optimizer state or average; of buffers and random numbers it is only reported."""
    kind, bit = trial.one_of(STATES), trial.dice.randrange(BITS)
    name, size = trial.dice.choice(BUFFERS if kind == "buffer" else PARAMETERS)
    place = trial.dice.randrange(size)
    trial.notes |= {"tensor": name, "bit": bit}
    if kind in STATES[:2]:
        when, _ = _run(trial, Flip(kind, name, bit, place))
        return _found_or_healed(trial, when)
    trial.faults = 0  # no promise: not counted
    if kind == "buffer":
        _run(trial, FlipBuffer(name=name, place=place, bit=bit))
    else:
        words = 2500 - 24  # bytes of the twister
        trial.notes["tensor"] = "the twister's words"
        _run(trial, FlipRandomState(place=trial.dice.randrange(words), bit=bit % 8))
    run = trial.folder / "run"
    trial.notes["noticed"] = any(events_of(run, kind) for kind in NOTICES)
    trial.notes["same end"] = trial.clean.difference(run, WORLD, WORDS) is None
    return None


def d5(trial: Trial) -> float | None:
    """One bit of one rank's gradient before the all-reduce: all replicas agree, and are wrong."""
    (name, size), bit = trial.dice.choice(PARAMETERS), trial.dice.randrange(BITS)
    trial.faults = 0
    trial.notes |= {"tensor": name, "bit": bit}
    place = trial.dice.randrange(size)
    _run(trial, FlipGradient(name=name, place=place, bit=bit))
    run = trial.folder / "run"
    trial.notes["noticed"] = any(events_of(run, kind) for kind in NOTICES)
    trial.notes["same end"] = trial.clean.difference(run, WORLD, WORDS) is None
    return None


def d6(trial: Trial) -> float | None:
    """One batch's loss is far too high on one rank."""
    rank, step = trial.dice.randrange(WORLD), trial.dice.randrange(6, STEPS)
    trial.notes |= {"rank": rank, "step": step}
    mark = trial.folder / "fired"
    fault = Corrupt(rank=rank, step=step, spoil=spoil, mark=str(mark))
    config = small(trial.folder / "run", *WORDS, "guards.loss_spike=1.5")
    ends = trained(trial.folder, config, fault, world_size=WORLD)
    trial.fired = mark.exists()
    check(all(o.error is None for o in ends), how_it_ended(ends, trial.folder))
    spikes = events_of(trial.folder / "run", "loss_spike")
    check(spikes and spikes[0]["step"] == step + 1, f"spikes at {[s['step'] for s in spikes]}")
    return max(0.0, spikes[0]["time"] - mark.stat().st_mtime)


ROWS = (
    Row(
        id="D3",
        promise="a flipped bit in one replica's parameters is found at the next check, its rank "
        "named, and rolled back, or provably healed; the end is bitwise",
        injection="each of 32 bits in random parameters of one rank of three",
        num_trials=320,
        measures="from the flip to its finding",
        work=d3,
        small=2,
    ),
    Row(
        id="D4",
        promise="a flipped bit in one replica's optimizer state or average is found or provably "
        "healed, bitwise; buffers and random numbers: no promise, not counted",
        injection=f"a random bit of one rank's {', '.join(STATES)}",
        num_trials=200,  # half of them of what is promised
        measures="from the flip to its finding",
        work=d4,
        small=2,
    ),
    Row(
        id="D5",
        promise="what share of flips in a gradient before the all-reduce is noticed: all replicas "
        "take the same wrong step, and only numbers that are absurd are seen",
        injection="a random bit of one rank's gradient",
        num_trials=100,
        measures="-",
        work=d5,
        promised=False,
    ),
    Row(
        id="D6",
        promise="a loss spike is reported in the step that follows",
        injection="one batch whose logits are 100 times too large on one rank of three",
        num_trials=10,
        measures="from the fault to the event",
        work=d6,
    ),
)
