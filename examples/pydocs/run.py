"""The demo: from the documentation on this machine to a searchable embedding model.

Data set → BM25 and the untrained base → stage 1 → hard negatives → stage 2 → scores on held-out
modules → example searches, plots, and what to type next. Everything lands in one run folder; the
parts are in the files beside this one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console

from nvembed.core.cache import cache_folder, expanded
from nvembed.core.config import load_config
from nvembed.core.errors import ConfigError, UserError
from nvembed.core.files import write_json
from nvembed.core.ownership import check_outputs, check_overlaps
from nvembed.core.runs import RunFolder
from nvembed.evaluation.results import TaskResult, write_results
from nvembed.evaluation.session import evaluate, evaluate_bm25
from nvembed.evaluation.tasks import LocalTask, load_task
from nvembed.interop.model_folder import ModelSource, model_kind
from pydocs.budget import plan_steps, rehearse, training_seconds
from pydocs.dataset import DEMO, TASK_NAMES, DemoData, build_dataset
from pydocs.harvest import harvest
from pydocs.plots import plot_losses, plot_scores
from pydocs.recipe import MAX_TOKENS, PRESETS, STAGES, Preset, Steps, demo_config, preset_for
from pydocs.report import (
    COLUMNS,
    main_scores,
    next_commands,
    score_table,
)
from pydocs.searches import EXAMPLE_QUERIES, Documents, Found, show_searches

if TYPE_CHECKING:
    from nvembed.core.arguments import Precision
    from nvembed.model.encoder import Encoder
    from nvembed.training.config import TrainConfig

LOSSES, SCORES = "losses.png", "scores.png"
BM25, BASE, BEFORE = "BM25", "base, mean pooling", "before"
STAGE1, STAGE2 = "after stage 1", "after stage 2"

Results = dict[str, dict[str, TaskResult]]


def run_demo(
    minutes: float,
    backbone: str | None,
    output: Path,
    *,
    seed: int = 0,
    cache: Path | Literal["default"] | None = "default",
    console: Console | None = None,
) -> Results:
    """Run the whole recipe and report.

    An interrupted run goes on from its last checkpoint when started again with the same arguments;
    a finished one starts over.

    Args:
        minutes: time to take; the numbers of steps follow from it and from a rehearsal.
        backbone: folder or hub id of a model; None is the best that is at hand, as for ``init``.
        output: run folder.
        seed: of data, training and mining.
        cache: folder that keeps the harvested documentation, by default that of the package; None
            keeps none.
        console: where to print; None is standard output.

    Returns:
        Model → task → result, as in the table that is printed.

    Raises:
        UserError: a part cannot be used; the message says which and what to do.
    """
    return _Demo(minutes, backbone, output, seed, cache, console or Console()).run()


class _Demo:
    """A demo in progress: its settings, and when it started."""

    def __init__(
        self,
        minutes: float,
        backbone: str | None,
        output: Path,
        seed: int,
        cache: Path | Literal["default"] | None,
        console: Console,
    ) -> None:
        from nvembed.training.first_recipe import default_backbone

        if minutes <= 0:
            raise ConfigError(f"{minutes:g} minutes", where="--minutes", expected="more than 0")
        self.seconds = 60 * minutes
        self.backbone = _absolute(backbone or default_backbone())
        self.output = output
        self.seed = seed
        if cache == "default":
            cache = cache_folder("demo")
        self.cache = expanded(cache, where=str(cache)) if cache else None
        self.console = console
        self.started = time.monotonic()

    def run(self) -> Results:
        """Do everything in order."""
        self._check_outputs()
        self._say(f"loading {self.backbone}")
        tuned = model_kind(ModelSource(self.backbone)) != "language_model"
        base = self._load_base(tuned)
        preset = preset_for(width=base.dimension, tuned=tuned)
        data = self._build_data(preset)
        tasks = [load_task(folder) for folder in data.tasks]
        name = BEFORE if tuned else BASE
        results: Results = {BM25: evaluate_bm25(tasks), name: {}}
        documents = Documents(data.searched, preset.searched_chars)
        found = {BM25: documents.by_words(EXAMPLE_QUERIES)}
        self._say(f"evaluating {name}" if tuned else "evaluating the base with mean pooling")
        results[name] = evaluate(base, tasks)
        searching = documents.seconds(base)
        if preset.thorough:
            found["before"] = documents.by_model(base, EXAMPLE_QUERIES)
        model = self._train(data, preset, results[name], searching)
        trained = self._score(model, preset, tasks, results)
        self._say("searching")
        found["after"] = documents.by_model(trained, EXAMPLE_QUERIES)
        self._save(results)
        self._report(results, found)
        return results

    def _score(
        self, model: Path, preset: Preset, tasks: Sequence[LocalTask], results: Results
    ) -> Encoder:
        """Add the scores of what training has made, and return the last of it."""
        from nvembed.model.encoder import load_encoder

        stages = {STAGE2: model}
        if preset.thorough:
            stages = {STAGE1: RunFolder(self.output).path / f"model-{STAGES[0]}"} | stages
        for name, folder in stages.items():
            self._say(f"evaluating {name}")
            trained = load_encoder(str(folder), self.precision)
            results[name] = evaluate(trained, tasks)
        return trained

    def _check_outputs(self) -> None:
        """Refuse to begin where something of the user's would be replaced."""
        run = RunFolder(self.output)
        names = [_results_name(model) for model in (BM25, BASE, BEFORE, STAGE1, STAGE2)]
        own = [run.path / name for name in ("data", "tasks", LOSSES, SCORES)]
        own += [run.eval / name for name in (*names, "scores.json")]
        check_outputs(own, made_by=DEMO, inputs=[self.backbone])
        check_overlaps(run.written(STAGES), [self.backbone])
        run.refuse_foreign(STAGES)

    def _build_data(self, preset: Preset) -> DemoData:
        self._say("reading the documentation of the installed packages")
        entries = harvest(cache=self.cache)
        data = build_dataset(entries, self.output, seed=self.seed, limits=preset.limits)
        task, records = data.stats[TASK_NAMES[0]], data.stats["records"]
        self._say(
            f"{len(entries):,} definitions → {records['retrieval']:,} training pairs; held out: "
            f"{task['documents']:,} documents, {task['queries']:,} queries"
        )
        return data

    def _load_base(self, tuned: bool) -> Encoder:
        from nvembed.model.embedder import NVEmbed

        pooling = None if tuned else "mean"
        return NVEmbed.from_pretrained(
            self.backbone, pooling=pooling, max_tokens=MAX_TOKENS, dtype=self.precision
        )

    @cached_property
    def precision(self) -> Precision:
        """What all models of the demo compute in: settled once, or that of the interrupted run."""
        from nvembed.kernels.machine import settle_precision

        found = self._interrupted_run()
        begun = None if found is None or found.precision == "auto" else found.precision
        return settle_precision("auto", begun=begun, option=None)

    def _train(
        self, data: DemoData, preset: Preset, base: dict[str, TaskResult], searching: float
    ) -> Path:
        from nvembed.training.trainer import train

        config = self._interrupted_run()
        if config is not None:
            self._say("going on with the interrupted run")
            return train(config, base_dir=self.output)
        self._say("rehearsing a few steps to see what fits into the time")
        times = rehearse(
            backbone=self.backbone,
            preset=preset,
            data=data.folder / "data",
            seed=self.seed,
            precision=self.precision,
        )
        evaluation = sum(result.seconds for result in base.values())
        document = base[TASK_NAMES[0]].seconds / data.stats[TASK_NAMES[0]]["documents"]
        seconds = training_seconds(
            self.seconds - self._elapsed(),
            evaluation=(1 + preset.thorough) * evaluation,
            # Mining embeds as many documents again as its queries have, and the queries.
            mining=document * preset.mined_queries,
            searching=searching,
            saving=preset.saving_seconds,
        )
        steps = plan_steps(seconds, times, preset.least_steps)
        self._say(
            f"training {steps.stage1:,} + {steps.stage2:,} steps, about "
            f"{max(0.0, seconds) / 60:.1f} minutes"
        )
        config = self._config(steps, preset).model_copy(update={"precision": self.precision})
        return train(config, base_dir=self.output, fresh=True)

    def _config(self, steps: Steps, preset: Preset) -> TrainConfig:
        return demo_config(
            output=str(self.output),
            backbone=self.backbone,
            steps=steps,
            preset=preset,
            seed=self.seed,
        )

    def _interrupted_run(self) -> TrainConfig | None:
        """Return the configuration of a run in the output folder that was not finished."""
        from nvembed.training.config import TrainConfig

        run = RunFolder(self.output)
        if not run.exists or run.model.exists() or not any(run.checkpoints.iterdir()):
            return None
        try:
            found = load_config(TrainConfig, run.config)
        except UserError:
            return None
        if len(found.stages) != len(STAGES):
            return None
        steps = Steps(*(stage.steps for stage in found.stages))
        asked = (
            self._config(steps, preset).model_copy(update={"precision": found.precision})
            for preset in PRESETS
        )
        return found if found in asked else None

    def _save(self, results: Results) -> None:
        run = RunFolder(self.output)
        for model, found in results.items():
            write_results(run.eval / _results_name(model), found, DEMO)
        write_json(run.eval / "scores.json", main_scores(results), DEMO)
        plot_losses(run.metrics, run.path / LOSSES)
        plot_scores(
            main_scores(results),
            COLUMNS,
            run.path / SCORES,
            title="Documentation of held-out Python modules",
        )

    def _report(self, results: Results, found: dict[str, Found]) -> None:
        self.console.print()
        self.console.print(score_table(results))
        show_searches(self.console, EXAMPLE_QUERIES, found)
        self.console.print(
            f"\nplots: {self.output}/{LOSSES}, {self.output}/{SCORES}", soft_wrap=True
        )
        self.console.print(f"took {self._elapsed() / 60:.1f} minutes\n")
        for purpose, command in next_commands(self.output):
            self.console.print(f"[bold]{purpose}[/bold]")
            for line in command.splitlines():
                self.console.print(f"  {line}", highlight=False, soft_wrap=True)

    def _elapsed(self) -> float:
        return time.monotonic() - self.started

    def _say(self, line: str) -> None:
        minutes, seconds = divmod(int(self._elapsed()), 60)
        self.console.print(
            f"[dim]{minutes:2d}:{seconds:02d}[/dim]  {line}", highlight=False, soft_wrap=True
        )


def _results_name(model: str) -> str:
    return f"{model.replace(', ', '-').replace(' ', '-')}.json"


def _absolute(backbone: str) -> str:
    """Make a folder's path independent of the recipe's folder; a hub id stays as it is."""
    return str(Path(backbone).resolve()) if Path(backbone).is_dir() else backbone
