"""One data set on its way from source to shards, step by step; see ``data/built_sets.py``.

    read            rows of the source become records; bad rows are refused
    distinct        equal records and equal queries, once each
    decontaminate   records that hold evaluation texts go
    finish          classes that cannot be converted, the cap, hard negatives, shards, manifest

The steps before the last lie in ``<folder>/.steps/<set>/`` until the set is done.
"""

from __future__ import annotations

import glob
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nvembed.building.contamination import Match
from nvembed.building.distinct import Repeats, distinct
from nvembed.building.mining import mined
from nvembed.building.rows import Notes, capped, class_problems, usable
from nvembed.building.steps import STEP_ROWS, Finished, Steps, name_of
from nvembed.building.tools import Tools
from nvembed.core import __version__
from nvembed.core.cache import content_hash
from nvembed.core.errors import DataError
from nvembed.core.files import atomic_folder, atomic_path, tidy, write_json
from nvembed.core.ownership import remove
from nvembed.core.reporting import progress
from nvembed.data.build_config import BuildConfig
from nvembed.data.built_sets import (
    FORMAT,
    MANIFEST,
    Rows,
    mining_of,
    read_manifest,
    set_settings,
    write_shards,
)
from nvembed.data.config import DatasetConfig
from nvembed.data.records import Converted, LabelRecord
from nvembed.data.sources.opening import open_dataset

BUILD = "data build"
REFUSED = "refused.jsonl"
CONTAMINATED = "contaminated.jsonl"
# Of a text in the list of contaminated records.
_SHOWN_CHARACTERS = 300
_BAR_ROWS = 500


@dataclass(frozen=True, slots=True)
class SetJob:
    """What is to be built, and where.

    Args:
        dataset: the set.
        build: how.
        folder: of all sets.
        base_dir: of the recipe.
        inputs: hashes of what is read: ``source`` (None: the hub), ``tasks``, ``teacher``, and
            ``reranker`` where there is one in a folder.
    """

    dataset: DatasetConfig
    build: BuildConfig
    folder: Path
    base_dir: Path
    inputs: dict[str, str | None]

    @property
    def target(self) -> Path:
        """Folder of the set."""
        return self.folder / self.dataset.name

    @property
    def steps_folder(self) -> Path:
        """Where its steps lie until it is done."""
        return steps_folder(self.folder, self.dataset.name)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides its contents, beside the inputs."""
        return set_settings(self.dataset, self.build)


def steps_folder(folder: Path, name: str) -> Path:
    """Where the steps of a set lie until it is done."""
    return folder / ".steps" / name


def refused_file(folder: Path, name: str) -> Path:
    """Where the bad rows of a set are listed that has too many of them."""
    return folder / f"{name}.{REFUSED}"


def finished_manifest(job: SetJob) -> dict[str, Any] | None:
    """The manifest of a set that is built already from the same settings and inputs.

    What a killed process left half written is deleted.
    """
    for path in (job.target, refused_file(job.folder, job.dataset.name)):
        tidy(job.folder, glob.escape(path.name))
    manifest = read_manifest(job.target)
    if manifest is None or manifest["settings"] != job.settings:
        return None
    if manifest["inputs"] != job.inputs:
        return None
    _clear(job)
    return manifest


def build_set(job: SetJob, tools: Tools) -> dict[str, Any]:
    """Build a set, going on where an earlier attempt ended, and return its manifest.

    Raises:
        UserError: source, tasks or teacher cannot be used, or too many rows are bad. The set as it
            was built before is untouched.
    """
    settings, inputs = job.settings, job.inputs
    source = [FORMAT, __version__, settings["source"], inputs["source"]]
    source += [settings["max_refused"]]
    compared = [*source, settings["decontaminate"], inputs["tasks"]]
    names = {
        "read": name_of("read", *source),
        "distinct": name_of("distinct", *source),
        "decontaminate": name_of("decontaminate", *compared),
    }
    steps = _steps(job)
    steps.tidy([*names.values(), _mine_name(job)])
    read = steps.run(names["read"], lambda folder: _read(job, folder))
    last = steps.run(names["distinct"], lambda folder: _distinct(job, read, folder))
    done = [read, last]
    if settings["decontaminate"] is not None:
        before = last
        last = steps.run(
            names["decontaminate"], lambda folder: _decontaminate(job, before, tools, folder)
        )
        done.append(last)
    manifest = _finish(job, done, tools)
    _clear(job)
    return manifest


def _steps(job: SetJob) -> Steps:
    return Steps(job.steps_folder, job.dataset.kind)


def _mine_name(job: SetJob) -> str:
    return name_of("mine", job.settings, job.inputs)


def _clear(job: SetJob) -> None:
    """Delete what is of no use once the set is done."""
    _steps(job).remove()
    remove(refused_file(job.folder, job.dataset.name))


# --- The steps ------------------------------------------------------------------------------------


def _read(job: SetJob, folder: Path) -> dict[str, Any]:
    name = job.dataset.name
    opened = open_dataset(job.dataset, base_dir=job.base_dir)
    with Notes(folder / REFUSED) as notes:
        rows = usable(opened.rows, notes, base_dir=job.base_dir)
        out = _write_step(folder, _shown(rows, f"{name}: read", None), job)
    read = out + notes.count
    if out == 0 or notes.count > job.build.max_refused * read:
        kept = refused_file(job.folder, name)
        with atomic_path(kept, BUILD) as temporary:
            shutil.copyfile(folder / REFUSED, temporary)
        first = notes.first or {"place": "", "problem": "the source holds no row"}
        raise DataError(
            f"{notes.count:,} of {read:,} rows are bad; the first, {first['place']}: "
            f"{first['problem']}",
            where=name,
            expected=f"at most {job.build.max_refused:.2%} (build.max_refused)",
            hint=f"All of them are listed in {kept}",
        )
    return {
        "in": read,
        "out": out,
        "refused": notes.count,
        "source_rows": opened.rows_read,
        "revision": opened.revision,
    }


def _distinct(job: SetJob, before: Finished, folder: Path) -> dict[str, Any]:
    repeats = Repeats()
    rows = distinct(before, folder / "spilled", repeats)
    total = before.counts["out"]
    out = _write_step(folder, _shown(rows, f"{job.dataset.name}: distinct", total), job)
    return {"in": total, "out": out, **asdict(repeats)}


def _decontaminate(job: SetJob, before: Finished, tools: Tools, folder: Path) -> dict[str, Any]:
    contamination = tools.contamination(job.build.bm25.get(job.dataset.name))
    rules: Counter[str] = Counter()
    tasks: Counter[str] = Counter()

    def clean(rows: Iterable[Converted], notes: Notes) -> Iterator[Converted]:
        for row in rows:
            if (match := contamination.check_record(row.record)) is None:
                yield row
                continue
            rules[match.rule] += 1
            tasks[match.found.task] += 1
            notes.add(place=row.place, **_described(match))

    total = before.counts["out"]
    with Notes(folder / CONTAMINATED) as notes:
        shown = _shown(before(), f"{job.dataset.name}: decontaminate", total)
        out = _write_step(folder, clean(shown, notes), job)
    return {
        "in": total,
        "out": out,
        "rules": dict(sorted(rules.items())),
        "tasks": dict(sorted(tasks.items())),
    }


def _described(match: Match) -> dict[str, Any]:
    return {
        "rule": match.rule,
        "score": round(match.score, 4),
        "texts": [text[:_SHOWN_CHARACTERS] for text in match.texts],
        "task": match.found.task,
        "part": match.found.part,
        "found": [text[:_SHOWN_CHARACTERS] for text in match.found.texts],
    }


def _finish(job: SetJob, done: list[Finished], tools: Tools) -> dict[str, Any]:
    """Write the folder of the set."""
    dataset, last = job.dataset, done[-1]
    with atomic_folder(job.target, BUILD) as temporary:
        shutil.copyfile(done[0].folder / REFUSED, temporary / REFUSED)
        if (last.folder / CONTAMINATED).is_file():
            shutil.copyfile(last.folder / CONTAMINATED, temporary / CONTAMINATED)
        usable_rows, unusable = _of_usable_classes(job, last, temporary / REFUSED)
        total = last.counts["out"] - unusable
        if total == 0:
            raise DataError("no record is left", where=dataset.name, expected=_losses(done))
        kept: Rows = lambda: capped(usable_rows, total, dataset)  # noqa: E731
        mining = mining_of(dataset, job.build)
        report: dict[str, Any] | None = None
        rows: Iterable[Converted]
        if mining is None:
            rows = _shown(kept(), f"{dataset.name}: write", None)
        else:
            rows, report = mined(
                dataset,
                mining.model_copy(update={"dtype": tools.teacher_dtype}),
                kept,
                usable_rows if dataset.max_records and dataset.max_records < total else None,
                work=job.steps_folder / _mine_name(job),
                base_dir=job.base_dir,
            )
        shards = write_shards(
            temporary, rows, dataset.kind, rows_per_shard=job.build.rows_per_shard
        )
        written = sum(shard.rows for shard in shards)
        steps = {
            name: step.counts
            for name, step in zip(("read", "distinct", "decontaminate"), done, strict=False)
        }
        steps["select"] = {
            "in": last.counts["out"],
            "out": written,
            "unusable_classes": unusable,
            "beyond_cap": total - written,
        }
        if report is not None:
            steps["mine"] = {"in": written, "out": written, **report}
        manifest = {
            "tool": f"nvembed {__version__}",
            "name": dataset.name,
            "kind": dataset.kind,
            "licence": dataset.licence,
            "revision": steps["read"].pop("revision"),
            "hash": content_hash(job.settings, job.inputs),
            "settings": job.settings,
            "inputs": job.inputs,
            "steps": steps,
            "rows": written,
            "shards": [asdict(shard) for shard in shards],
        }
        write_json(temporary / MANIFEST, manifest)
    return manifest


def _of_usable_classes(job: SetJob, rows: Rows, refused: Path) -> tuple[Rows, int]:
    """The rows without those of classes that cannot be converted, and how many those are."""
    if job.dataset.kind not in ("classification", "clustering"):
        return rows, 0
    problems = class_problems(rows, job.dataset.conversion)
    if not problems:
        return rows, 0

    def problem(row: Converted) -> str | None:
        assert isinstance(row.record, LabelRecord)
        return problems.get(row.record.label)

    with Notes(refused) as notes:
        for row in rows():
            if (found := problem(row)) is not None:
                notes.add(place=row.place, problem=found)
    return lambda: (row for row in rows() if problem(row) is None), notes.count


def _losses(done: list[Finished]) -> str:
    """What became of the rows, for the error that says that none is left."""
    counts = [f"{step.counts['in']:,} → {step.counts['out']:,}" for step in done]
    return f"some of them to pass all steps ({', '.join(counts)})"


def _write_step(folder: Path, rows: Iterable[Converted], job: SetJob) -> int:
    shards = write_shards(folder, rows, job.dataset.kind, rows_per_shard=STEP_ROWS, places=True)
    return sum(shard.rows for shard in shards)


def _shown(rows: Iterable[Converted], description: str, total: int | None) -> Iterator[Converted]:
    """Yield the rows with a progress bar."""
    with progress(total, description) as bar:
        for number, row in enumerate(rows, start=1):
            yield row
            if number % _BAR_ROWS == 0:
                bar.advance(_BAR_ROWS)
