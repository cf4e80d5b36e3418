"""The counters of a run: equal on all ranks, part of every checkpoint."""

import secrets
from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class Progress:
    """How far a run is, and the best it has been."""

    step: int = 0  # global batches consumed, skipped or not
    generation: int = 0
    samples_seen: int = 0
    skipped_steps: int = 0
    evaluated_step: int = -1  # the last step whose evaluation is recorded
    last_eval: dict[str, float] = field(default_factory=dict)
    best_accuracy: float | None = None  # on the validation split
    best_step: int | None = None
    evals_without_better: int = 0
    patience: int | None = None  # of early stopping
    train_sec: float = 0.0  # without evaluations and saves, over all attempts
    wall_sec: float = 0.0  # over all attempts
    tracker_id: str = field(default_factory=lambda: secrets.token_hex(4))

    def begin_elsewhere(self) -> None:
        """Forget what belongs to the run that this state was taken from: its best, its times."""
        self.best_accuracy, self.best_step, self.evals_without_better = None, None, 0
        self.train_sec = self.wall_sec = 0.0
        self.tracker_id = secrets.token_hex(4)

    @property
    def patience_is_over(self) -> bool:
        """Whether early stopping ends the run here."""
        return self.patience is not None and self.evals_without_better >= self.patience

    def note_evaluation(self, result: dict[str, float], *, validated: bool) -> None:
        """Record an evaluation of this step; only a validation split makes a best."""
        self.evaluated_step, self.last_eval = self.step, result
        if not validated:
            return
        if self.best_accuracy is None or result["accuracy"] > self.best_accuracy:
            self.best_accuracy, self.best_step = result["accuracy"], self.step
            self.evals_without_better = 0
        else:
            self.evals_without_better += 1
