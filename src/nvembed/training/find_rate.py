"""A search for the learning rate of a recipe's first stage: a short training at each of some rates.

All start from the same weights and take the same batches, under the stage's own schedule made
short; what is compared is the mean loss of the last quarter of the steps, when the rate has fallen
as it will have at the end of the run. Nothing is written but the picture that was asked for.
"""

from __future__ import annotations

import io
import math
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nvembed.core.errors import ConfigError, TrainingError
from nvembed.core.files import atomic_path
from nvembed.core.ownership import check_outputs
from nvembed.core.reporting import ProgressBar, progress
from nvembed.core.runs import TRAIN, RunFolder
from nvembed.kernels.machine import watched_threads
from nvembed.model.settings import shown_rate
from nvembed.training import model, run_folder, stages
from nvembed.training.checkpoint import trained_parameters
from nvembed.training.config import StageConfig, TrainConfig, training_inputs
from nvembed.training.distributed import DistributedContext
from nvembed.training.stage_mining import plan_mining
from nvembed.training.stages import peak_rate, with_fitting_rates
from nvembed.training.teacher import PROJECTION, fit_projection, prepared
from nvembed.training.teacher_states import teacher_states
from nvembed.training.trial import TriedStage

FACTOR = 2.5  # between two rates
_AROUND = (0, 1, -1, 2, -2)  # first tried, in steps of the factor from the rate of the recipe
_MOST_RATES = 9
_FEWEST_RATES = 3  # whatever the time, so that something is compared
_FEWEST_STEPS, _MOST_STEPS = 8, 40  # at each rate
_TIMED_STEPS = 2  # the first of them is slower than the others


@dataclass(frozen=True, slots=True)
class Trial:
    """A short training; the losses end where they were no longer finite."""

    rate: float
    losses: tuple[float, ...]
    diverged: bool = False

    @property
    def tail(self) -> tuple[float, ...]:
        """Losses of the last quarter of the steps."""
        return self.losses[-max(1, len(self.losses) // 4) :]

    @property
    def loss(self) -> float:
        """Mean of the tail; infinite where the training diverged."""
        return math.inf if self.diverged else statistics.fmean(self.tail)


@dataclass(frozen=True, slots=True)
class RateSearch:
    """What was tried, from low to high."""

    stage: StageConfig  # as the recipe has it, with its rate
    steps: int
    trials: tuple[Trial, ...]
    seconds: float

    @property
    def best(self) -> Trial:
        """The lowest loss at the end."""
        return min(self.trials, key=lambda trial: trial.loss)

    @property
    def is_open(self) -> bool:
        """Whether the best is the lowest or the highest rate, so that beyond may be better."""
        return self.best in (self.trials[0], self.trials[-1])


def next_place(losses: dict[int, float]) -> int | None:
    """Where to try next, in steps from the first rate, or ``None`` when the best is surrounded."""
    for place in _AROUND:
        if place not in losses:
            return place
    if len(losses) == _MOST_RATES:
        return None
    best = min(losses, key=lambda place: losses[place])
    return {max(losses): best + 1, min(losses): best - 1}.get(best)


def find_rate(
    config: TrainConfig, *, base_dir: Path, minutes: float = 15, plot: Path | None = None
) -> RateSearch:
    """Try learning rates on the first stage of a run, and nothing of its folder is touched.

    Args:
        config: the run; its rate, or the one that fits the model, is the first that is tried.
        base_dir: folder that relative paths start from.
        minutes: beyond three rates none is begun when they are over; they decide how many steps
            each has.
        plot: PNG to draw the losses to; ``None`` draws none.

    Raises:
        UserError: data or model cannot be used, or every rate diverged.
    """
    if (launched := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ConfigError(f"{launched} processes were started", where="--find-rate", expected="one")
    if plot is not None:
        if plot.suffix.lower() != ".png":
            raise ConfigError("is no name of a picture", where=str(plot), expected="NAME.png")
        import matplotlib  # noqa: F401  # before the work, if it is missing

        check_outputs([plot], made_by=TRAIN, inputs=training_inputs(config, base_dir))
    config, _ = run_folder.with_settled_choices(config, RunFolder(Path(config.output)), fresh=True)
    found = _Search(config, base_dir, minutes).run()
    if math.isinf(found.best.loss):
        raise TrainingError(
            f"the loss is not finite at any rate from {shown_rate(found.trials[0].rate)} on",
            where=found.stage.name,
            hint="Raise the temperature, or compute in float32",
        )
    if plot is not None:
        with atomic_path(plot, TRAIN) as path:
            path.write_bytes(draw(found))
    return found


@dataclass
class _Search:
    config: TrainConfig
    base_dir: Path
    minutes: float
    trials: dict[int, Trial] = field(default_factory=dict)

    def run(self) -> RateSearch:
        """Load data and model, and try rates until time is over or the best is surrounded."""
        mixture = stages.load_mixtures(self.config, self.base_dir)[0]
        mine = self.config.stages[0].mine
        if mine is not None:  # random documents stand in for what would be mined
            nowhere = Path(self.config.output) / "none"
            first = self.config.stages[0]
            mixture, _ = plan_mining(self.config, first, mixture, self.base_dir, nowhere)
        self.mixture = mixture
        self.processes = DistributedContext.of_environment()
        device = self.processes.device
        self.embedder = model.starting_model(self.config, self.base_dir, device=str(device))
        self.config, _ = with_fitting_rates(self.config, self.embedder)
        stage = self.config.stages[0]
        self.start = {
            name: parameter.detach().clone()
            for name, parameter in trained_parameters(self.embedder).items()
        }
        began = time.monotonic()
        with watched_threads(self.config.threads), model.computing(self.config, device):
            self.embedder.train()
            self.budget = model.measure_activation_budget(self.embedder, self.config).tokens
            steps = self._steps_that_fit(stage)
            with progress(len(_AROUND) * steps, "learning rates") as bar:
                while (
                    place := next_place({n: t.loss for n, t in self.trials.items()})
                ) is not None:
                    is_late = time.monotonic() - began > 60 * self.minutes
                    if is_late and len(self.trials) >= _FEWEST_RATES:
                        break
                    rate = float(f"{peak_rate(stage) * FACTOR**place:.1e}")
                    self.trials[place] = self._trial(stage, rate, steps, bar)
        trials = tuple(sorted(self.trials.values(), key=lambda trial: trial.rate))
        return RateSearch(stage, steps, trials, time.monotonic() - began)

    def _steps_that_fit(self, stage: StageConfig) -> int:
        """Steps that each rate may have, from the time that one takes."""
        took = list[float]()
        self._trial(stage, peak_rate(stage), _TIMED_STEPS, None, took)
        # Two more rates than those that are always tried.
        fit = 60 * self.minutes / (len(_AROUND) + 2) / took[-1]
        return min(stage.steps, max(_FEWEST_STEPS, min(_MOST_STEPS, int(fit))))

    def _trial(
        self,
        stage: StageConfig,
        rate: float,
        steps: int,
        bar: ProgressBar | None,
        took: list[float] | None = None,
    ) -> Trial:
        """Train from the start for some steps; ``took`` gets the seconds of each."""
        tried = self._stage(stage, rate, min(steps, stage.steps))
        losses, started = list[float](), tried.stage
        with suppress(FloatingPointError):
            for number in range(started.config.steps):
                began = time.monotonic()
                share = stages.stage_schedule(number, started.config, self.config.optimizer)
                stages.set_learning_rate(started.optimizer, share)
                result = tried.step(number, started.loader.step(number))
                losses.append(result.loss)
                if took is not None:
                    took.append(time.monotonic() - began)
                if bar is not None:
                    bar.advance(1, rate=shown_rate(rate), loss=result.loss)
        return Trial(rate, tuple(losses), diverged=len(losses) < started.config.steps)

    def _stage(self, stage: StageConfig, rate: float, steps: int) -> TriedStage:
        """The stage made short, at its start."""
        short = stage.model_copy(
            update={
                "steps": steps,
                "warmup_steps": min(stage.warmup_steps, steps // 5),
                "learning_rate": rate,
            }
        )
        config = self.config.model_copy(update={"stages": (short, *self.config.stages[1:])})
        tokenizer = self.embedder.backbone.text_tokenizer
        loader = stages.DataLoader(self.mixture, short, seed=config.seed, tokenizer=tokenizer)
        if short.teacher is not None:
            loader.states = teacher_states(short, self.base_dir, self.embedder)
            with torch.autocast(self.processes.device.type, enabled=False):
                loader.teacher = prepared(
                    short.teacher, self.base_dir, loader.given(0), self.processes, lambda line: None
                )
        trained = trained_parameters(self.embedder)
        with torch.no_grad():
            for name, value in self.start.items():
                trained[name].copy_(value)
        tried = TriedStage(
            self.embedder, config, 0, loader, self.processes, activation_budget=self.budget
        )
        if (projection := tried.beside[PROJECTION]) is not None:
            first = map(loader.step, range(steps))
            fit_projection(projection, self.embedder, first, config.pack_tokens, nullcontext)
        return tried


# --- What is shown --------------------------------------------------------------------------------


def lines_of(found: RateSearch) -> list[str]:
    """A table of the rates, and the change of the recipe that takes the best."""
    name, batch = found.stage.name, found.stage.batch_size
    rows = [("learning rate", "loss at the end", "")]
    for trial in found.trials:
        loss = "diverged" if trial.diverged else f"{trial.loss:.4f}"
        notes = ["best"] * (trial is found.best)
        notes += ["what the run would take"] * (
            trial.rate == float(f"{peak_rate(found.stage):.1e}")
        )
        rows.append((shown_rate(trial.rate), loss, ", ".join(notes)))
    lines = [
        f"{name}: {len(found.trials)} learning rates, {found.steps} steps of {batch} queries each, "
        f"from the same start and with the same batches; {found.seconds:.0f} s",
        *(f"{rate:>13}  {loss:>15}  {note}".rstrip() for rate, loss, note in rows),
    ]
    if found.is_open:
        edge = "higher" if found.best is found.trials[-1] else "lower"
        lines.append(
            f"! a {edge} rate may be better: try again with the one below and more --minutes"
        )
    return [*lines, f"stages.{name}.learning_rate={shown_rate(found.best.rate)}"]


def draw(found: RateSearch) -> bytes:
    """A PNG: the losses of every rate step by step, and the loss at the end against the rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), dpi=150)
    curves, ends = figure.subplots(1, 2, sharey=True)
    for trial, shade in zip(found.trials, _shades(len(found.trials)), strict=True):
        steps = range(1, len(trial.losses) + 1)
        curves.plot(steps, trial.losses, color=shade, label=shown_rate(trial.rate), linewidth=1.2)
    finite = [trial for trial in found.trials if not trial.diverged]
    ends.plot([t.rate for t in finite], [t.loss for t in finite], "o-", color="#4f5b66")
    ends.plot([found.best.rate], [found.best.loss], "o", color="#c8502c", markersize=9)
    ends.set_xscale("log")
    ends.set_xlabel("learning rate")
    ends.set_title(f"mean of the last quarter; best {shown_rate(found.best.rate)}", fontsize=10)
    curves.set_xlabel("step")
    curves.set_ylabel("loss")
    curves.set_title(f"{found.stage.name}, {found.stage.batch_size} queries a step", fontsize=10)
    curves.legend(fontsize=8, frameon=False)
    for axis in (curves, ends):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _shades(count: int) -> Sequence[tuple[float, float, float]]:
    """From blue to red."""
    places = (place / max(1, count - 1) for place in range(count))
    return [(place, 0.35, 1 - place) for place in places]
