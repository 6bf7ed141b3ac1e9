"""The demo: from the documentation on this machine to a searchable embedding model.

Data set → BM25 and the untrained base → stage 1 → hard negatives → stage 2 → scores on held-out
modules → example searches, plots, and what to type next. Everything lands in one run folder; the
parts are in the files beside this one.
"""

from __future__ import annotations

import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console

from nvembed.core.cache import cache_folder, expanded
from nvembed.core.config import load_config
from nvembed.core.errors import ConfigError, ModelError, UserError
from nvembed.core.files import write_json
from nvembed.core.ownership import check_outputs, check_overlaps
from nvembed.core.runs import RunFolder
from nvembed.evaluation.results import TaskResult, write_results
from nvembed.evaluation.session import evaluate, evaluate_bm25
from nvembed.evaluation.tasks import load_task
from pydocs.budget import plan_steps, rehearse, training_seconds
from pydocs.dataset import DEMO, TASK_NAMES, DemoData, build_dataset
from pydocs.harvest import harvest
from pydocs.plots import plot_losses, plot_scores
from pydocs.recipe import MAX_TOKENS, MINED_QUERIES, STAGES, Steps, demo_config
from pydocs.report import (
    COLUMNS,
    main_scores,
    next_commands,
    score_table,
)
from pydocs.searches import EXAMPLE_QUERIES, Documents, Found, show_searches

if TYPE_CHECKING:
    from nvembed.core.arguments import Precision
    from nvembed.encoding.encoder import Encoder
    from nvembed.training.config import TrainConfig

DEFAULT_BACKBONE = Path("assets") / "decoder-6m"
LOSSES, SCORES = "losses.png", "scores.png"
BM25, BASE, STAGE1, STAGE2 = "BM25", "base, mean pooling", "after stage 1", "after stage 2"

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
        backbone: folder or hub id of a decoder; None is the project's own.
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


def default_backbone() -> str:
    """Return the folder of the project's own decoder.

    Raises:
        ModelError: this is not a checkout of the repository, which alone holds the decoder.
    """
    folder = Path(__file__).resolve().parents[2] / DEFAULT_BACKBONE
    if not (folder / "config.json").is_file():
        raise ModelError(
            "the project's own decoder is not here",
            where=str(folder),
            expected="a checkout of the repository, as the decoder is not part of the package",
            hint="Run it in a checkout, or name a decoder with --backbone",
        )
    return str(folder)


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
        if minutes <= 0:
            raise ConfigError(f"{minutes:g} minutes", where="--minutes", expected="more than 0")
        self.seconds = 60 * minutes
        self.backbone = _absolute(backbone) if backbone else default_backbone()
        self.output = output
        self.seed = seed
        self.search_seconds = 0.0
        if cache == "default":
            cache = cache_folder("demo")
        self.cache = expanded(cache, where=str(cache)) if cache else None
        self.console = console
        self.started = time.monotonic()

    def run(self) -> Results:
        """Do everything in order."""
        self._check_outputs()
        data = self._build_data()
        tasks = [load_task(folder) for folder in data.tasks]
        results: Results = {BM25: evaluate_bm25(tasks), BASE: {}}
        documents = Documents(data.searched)
        found = {BM25: documents.by_words(EXAMPLE_QUERIES)}
        self._say("evaluating the base with mean pooling")
        base = self._load_base()
        results[BASE] = evaluate(base, tasks)
        searched = self._elapsed()
        found["before"] = documents.by_model(base, EXAMPLE_QUERIES)
        self.search_seconds = self._elapsed() - searched
        from nvembed.encoding.encoder import load_encoder

        model = self._train(data, results[BASE])
        run = RunFolder(self.output)
        for name, folder in ((STAGE1, run.path / f"model-{STAGES[0]}"), (STAGE2, model)):
            self._say(f"evaluating {name}")
            tuned = load_encoder(str(folder), self.precision)
            results[name] = evaluate(tuned, tasks)
        found["after"] = documents.by_model(tuned, EXAMPLE_QUERIES)
        self._save(results)
        self._report(results, found)
        return results

    def _check_outputs(self) -> None:
        """Refuse to begin where something of the user's would be replaced."""
        run = RunFolder(self.output)
        names = [_results_name(model) for model in (BM25, BASE, STAGE1, STAGE2)]
        own = [run.path / name for name in ("data", "tasks", LOSSES, SCORES)]
        own += [run.eval / name for name in (*names, "scores.json")]
        check_outputs(own, made_by=DEMO, inputs=[self.backbone])
        check_overlaps(run.written(STAGES), [self.backbone])
        run.refuse_foreign(STAGES)

    def _build_data(self) -> DemoData:
        self._say("reading the documentation of the installed packages")
        entries = harvest(cache=self.cache)
        data = build_dataset(entries, self.output, seed=self.seed)
        task, records = data.stats[TASK_NAMES[0]], data.stats["records"]
        self._say(
            f"{len(entries):,} definitions → {records['retrieval']:,} training pairs; held out: "
            f"{task['documents']:,} documents, {task['queries']:,} queries"
        )
        return data

    def _load_base(self) -> Encoder:
        from nvembed.model.embedder import NVEmbed

        return NVEmbed.from_pretrained(
            self.backbone, pooling="mean", max_tokens=MAX_TOKENS, dtype=self.precision
        )

    @cached_property
    def precision(self) -> Precision:
        """What all models of the demo compute in: settled once, or that of the interrupted run."""
        from nvembed.kernels.precision import settle_precision

        found = self._interrupted_run()
        begun = None if found is None or found.precision == "auto" else found.precision
        return settle_precision("auto", begun=begun, option=None)

    def _train(self, data: DemoData, base: dict[str, TaskResult]) -> Path:
        from nvembed.training.trainer import train

        config = self._interrupted_run()
        if config is not None:
            self._say("going on with the interrupted run")
            return train(config, base_dir=self.output)
        self._say("rehearsing a few steps to see what fits into the time")
        times = rehearse(
            backbone=self.backbone,
            data=data.folder / "data",
            seed=self.seed,
            precision=self.precision,
        )
        retrieval = base[TASK_NAMES[0]].seconds
        seconds = training_seconds(
            self.seconds - self._elapsed(),
            evaluation=sum(result.seconds for result in base.values()),
            # Mining embeds as many documents again as its queries have, and the queries.
            mining=retrieval * MINED_QUERIES / data.stats[TASK_NAMES[0]]["documents"],
            searching=self.search_seconds,
        )
        steps = plan_steps(seconds, times)
        self._say(
            f"training {steps.stage1:,} + {steps.stage2:,} steps, about "
            f"{max(0.0, seconds) / 60:.1f} minutes"
        )
        config = self._config(steps).model_copy(update={"precision": self.precision})
        return train(config, base_dir=self.output, fresh=True)

    def _config(self, steps: Steps) -> TrainConfig:
        return demo_config(
            output=str(self.output), backbone=self.backbone, steps=steps, seed=self.seed
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
        asked = self._config(steps).model_copy(update={"precision": found.precision})
        return found if found == asked else None

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
