"""One data set on its way from source to shards, step by step; see ``data/built_sets.py``.

The steps before the last are folders in ``<folder>/.steps/<set>/`` until the set is done. Each is
finished as a whole or not at all and named after a hash of everything that decides its contents: so
it is not repeated, and what a killed process left half written has another name and is deleted.
"""

from __future__ import annotations

import glob
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

from nvembed.building.contamination import Contamination, evaluation_texts
from nvembed.building.hard_negatives import mined, teacher_name
from nvembed.building.row_filters import ClassSamples, Notes, Repeats, capped, distinct, usable
from nvembed.core import __version__
from nvembed.core.arguments import Precision, PrecisionChoice
from nvembed.core.cache import content_hash, digest_of
from nvembed.core.errors import DataError
from nvembed.core.files import atomic_folder, atomic_path, read_json_object, tidy, write_json
from nvembed.core.ownership import remove, remove_named
from nvembed.core.reporting import progress
from nvembed.core.store import STORED
from nvembed.data.built_sets import (
    FORMAT,
    MANIFEST,
    Rows,
    mining_of,
    read_manifest,
    read_shards,
    set_settings,
    write_shards,
)
from nvembed.data.config import BuildConfig, DatasetConfig
from nvembed.data.loading import local_sources, open_dataset
from nvembed.data.records import Converted, LabelRecord
from nvembed.evaluation.tasks import load_tasks
from nvembed.interop.model_folder import contents_fingerprint, find_gguf
from nvembed.mining.ranking import BM25_NAME
from nvembed.model.encoder import is_endpoint

BUILD = "data build"
_REFUSED = "refused.jsonl"
_CONTAMINATED = "contaminated.jsonl"
_COUNTS = "counts.json"
_STEP_ROWS = 250_000  # of an intermediate file; the recipe says how long those of the set are
_SHOWN_CHARACTERS = 300  # of a text in the list of contaminated records
_BAR_ROWS = 500
_STEP = re.compile(r"(read|distinct|decontaminate|mine)-[0-9a-f]{16}")
# What the steps leave, the miner's files among them.
_STEP_FILES = re.compile(
    rf"{_COUNTS}|part-\d+\.parquet|(refused|contaminated|in|further|documents|out)\.jsonl"
    rf"|out\.jsonl\.report\.json|spilled(/\d+\.jsonl)?|{STORED.pattern}"
)


@dataclass(eq=False)
class BuildContext:
    """What the sets of one build share; evaluation texts and digests are read once."""

    build: BuildConfig
    base_dir: Path
    folder: Path

    def inputs_of(self, dataset: DatasetConfig) -> dict[str, str | None]:
        """Return hashes of what a set is built from; None for what comes from the hub."""
        files = local_sources(dataset, self.base_dir)
        found = {
            "source": content_hash(*map(digest_of, files)) if files else None,
            "tasks": self._tasks_digest,
            "teacher": None,
        }
        if (mine := mining_of(dataset, self.build)) is not None:
            found["teacher"] = self._fingerprint(teacher_name(mine.teacher, self.base_dir))
            if mine.rerank is not None and (reranker := self._fingerprint(mine.rerank)):
                found["reranker"] = reranker
        return found

    @cached_property
    def _tasks_digest(self) -> str | None:
        folders = [digest_of(self.base_dir / name) for name in self.build.tasks]
        return content_hash(*folders) if folders else None

    @lru_cache(maxsize=2)  # noqa: B019 - lives as long as the command
    def _fingerprint(self, folder: str) -> str | None:
        is_here = Path(folder).is_dir() or find_gguf(folder) is not None
        return contents_fingerprint(folder) if is_here else None

    @lru_cache(maxsize=1)  # noqa: B019 - lives as long as the command
    def contamination(self, bm25: float | None) -> Contamination:
        """Find evaluation texts, with a BM25 threshold where a set has one."""
        tasks = load_tasks([self.base_dir / folder for folder in self.build.tasks])
        return Contamination(evaluation_texts(tasks), near=self.build.near, bm25=bm25)

    @cached_property
    def teacher_dtype(self) -> PrecisionChoice:
        """Settled for all sets at once: that of sets that are built already, if there are any."""
        mine = self.build.mine
        assert mine is not None
        if mine.teacher == BM25_NAME or is_endpoint(mine.teacher):
            return mine.dtype
        from nvembed.kernels.machine import settle_precision

        manifests = [
            read_manifest(file.parent) for file in sorted(self.folder.glob(f"*/{MANIFEST}"))
        ]
        mining = [(manifest or {}).get("steps", {}).get("mine", {}) for manifest in manifests]
        dtypes = [(counts.get("computing") or {}).get("dtype") for counts in mining]
        begun: Precision | None = next((one for one in dtypes if one in get_args(Precision)), None)
        return settle_precision(mine.dtype, begun=begun, option="build.mine.dtype=float32")


class FinishedStep(NamedTuple):
    """A step's folder, with shards of records and other files, what it counted, its records."""

    folder: Path
    counts: dict[str, Any]
    rows: Rows


class SetBuild:
    """The build of one set, which goes on where an earlier attempt ended."""

    def __init__(self, dataset: DatasetConfig, context: BuildContext) -> None:
        self._dataset = dataset
        self._context = context
        self._build = context.build
        self.target, self.refused, self._steps = set_places(context.folder, dataset.name)
        self._settings = set_settings(dataset, context.build)
        self._inputs = context.inputs_of(dataset)
        self._mining = self._steps / _step_name("mine", self._settings, self._inputs)

    def finished_manifest(self) -> dict[str, Any] | None:
        """The manifest of a set that is built already from the same; half written things go."""
        for path in (self.target, self.refused):
            tidy(path.parent, glob.escape(path.name))
        manifest = read_manifest(self.target)
        if manifest is None:
            return None
        if (manifest["settings"], manifest["inputs"]) != (self._settings, self._inputs):
            return None
        self._clear()
        return manifest

    def run(self) -> dict[str, Any]:
        """Build the set and return its manifest; an error leaves the set as it was before."""
        settings, inputs = self._settings, self._inputs
        source = [FORMAT, __version__, settings["source"], inputs["source"]]
        source += [settings["max_refused"]]
        plan: dict[str, tuple[Callable[..., dict[str, Any]], list[Any]]] = {
            "read": (self._read, source),
            "distinct": (self._distinct, source),
        }
        if settings["decontaminate"] is not None:
            compared = [*source, settings["decontaminate"], inputs["tasks"]]
            plan["decontaminate"] = self._decontaminate, compared
        folders = {step: self._steps / _step_name(step, *key) for step, (_, key) in plan.items()}
        self._tidy_steps([*folders.values(), self._mining])
        done: dict[str, FinishedStep] = {}
        for step, (make, _) in plan.items():
            counts: dict[str, Any] | None = None
            with suppress(DataError):  # not done, or damaged since
                counts = read_json_object(folders[step] / _COUNTS, "the counts of a step")
            if counts is None:
                before = list(done.values())[-1:]
                with atomic_folder(folders[step]) as temporary:
                    counts = make(temporary, *before)
                    write_json(temporary / _COUNTS, counts)
            rows = partial(read_shards, folders[step], self._dataset.kind)
            done[step] = FinishedStep(folders[step], counts, rows)
        manifest = self._finish(done)
        self._clear()
        return manifest

    def _tidy_steps(self, kept: Sequence[Path] = ()) -> None:
        """Delete what was half written, and all other steps; what else lies there stays."""
        if self._steps.is_dir():
            tidy(self._steps, "*")
            for path in self._steps.iterdir():
                if path not in kept and _STEP.fullmatch(path.name) and path.is_dir():
                    remove_named(path, _STEP_FILES)

    def _clear(self) -> None:
        """Delete what is of no use once the set is done."""
        self._tidy_steps()
        for folder in (self._steps, self._steps.parent):
            with suppress(OSError):  # there is none, or other sets are not done yet
                folder.rmdir()
        remove(self.refused)

    # --- The steps --------------------------------------------------------------------------------

    def _read(self, folder: Path) -> dict[str, Any]:
        opened = open_dataset(self._dataset, base_dir=self._context.base_dir)
        with closing(Notes(folder / _REFUSED)) as notes:
            rows = usable(opened.rows, notes, base_dir=self._context.base_dir)
            out = self._write(folder, "read", rows)["out"]
        read = out + notes.count
        if out == 0 or notes.count > self._build.max_refused * read:
            with atomic_path(self.refused, BUILD) as temporary:
                shutil.copyfile(folder / _REFUSED, temporary)
            first = notes.first or {"place": "", "problem": "the source holds no row"}
            raise DataError(
                f"{notes.count:,} of {read:,} rows are bad; the first, {first['place']}: "
                f"{first['problem']}",
                where=self._dataset.name,
                expected=f"at most {self._build.max_refused:.2%} (build.max_refused)",
                hint=f"All of them are listed in {self.refused}",
            )
        return {
            "in": read,
            "out": out,
            "refused": notes.count,
            "source_rows": opened.rows_read,
            "revision": opened.revision,
        }

    def _distinct(self, folder: Path, before: FinishedStep) -> dict[str, Any]:
        repeats = Repeats()
        rows = distinct(before.rows, folder / "spilled", repeats)
        return self._write(folder, "distinct", rows, before.counts["out"]) | asdict(repeats)

    def _decontaminate(self, folder: Path, before: FinishedStep) -> dict[str, Any]:
        contamination = self._context.contamination(self._build.bm25.get(self._dataset.name))
        rules: Counter[str] = Counter()
        tasks: Counter[str] = Counter()

        def clean(notes: Notes) -> Iterator[Converted]:
            for row in before.rows():
                if (match := contamination.check_record(row.record)) is None:
                    yield row
                    continue
                rules[match.rule] += 1
                tasks[match.found.task] += 1
                notes.add(
                    place=row.place,
                    rule=match.rule,
                    score=round(match.score, 4),
                    texts=[text[:_SHOWN_CHARACTERS] for text in match.texts],
                    task=match.found.task,
                    part=match.found.part,
                    found=[text[:_SHOWN_CHARACTERS] for text in match.found.texts],
                )

        with closing(Notes(folder / _CONTAMINATED)) as notes:
            counts = self._write(folder, "decontaminate", clean(notes), before.counts["out"])
        found = {"rules": rules, "tasks": tasks}
        return counts | {name: dict(sorted(some.items())) for name, some in found.items()}

    def _write(
        self, folder: Path, step: str, rows: Iterable[Converted], total: int | None = None
    ) -> dict[str, Any]:
        """Write the rows of a step and count them."""
        shown = _shown(rows, f"{self._dataset.name}: {step}", total)
        kind = self._dataset.kind
        shards = write_shards(folder, shown, kind, rows_per_shard=_STEP_ROWS, places=True)
        return {"in": total, "out": sum(shard.rows for shard in shards)}

    def _finish(self, done: dict[str, FinishedStep]) -> dict[str, Any]:
        """Write the folder of the set."""
        dataset, last = self._dataset, list(done.values())[-1]
        with atomic_folder(self.target, BUILD) as temporary:
            for name, step in ((_REFUSED, done["read"]), (_CONTAMINATED, last)):
                if (step.folder / name).is_file():
                    shutil.copyfile(step.folder / name, temporary / name)
            usable_rows, unusable = self._of_usable_classes(last.rows, temporary / _REFUSED)
            total = last.counts["out"] - unusable
            if total == 0:
                losses = [f"{one.counts['in']:,} → {one.counts['out']:,}" for one in done.values()]
                raise DataError(
                    "no record is left",
                    where=dataset.name,
                    expected=f"some of them to pass all steps ({', '.join(losses)})",
                )
            rows, report = self._mined(usable_rows, total)
            shards = write_shards(
                temporary, rows, dataset.kind, rows_per_shard=self._build.rows_per_shard
            )
            written = sum(shard.rows for shard in shards)
            steps = {name: step.counts for name, step in done.items()}
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
                "hash": content_hash(self._settings, self._inputs),
                "settings": self._settings,
                "inputs": self._inputs,
                "steps": steps,
                "rows": written,
                "shards": [asdict(shard) for shard in shards],
            }
            write_json(temporary / MANIFEST, manifest)
        return manifest

    def _of_usable_classes(self, rows: Rows, refused: Path) -> tuple[Rows, int]:
        """The rows without those of classes that cannot be converted, and how many those are."""
        if self._dataset.kind not in ("classification", "clustering"):
            return rows, 0
        classes = ClassSamples()
        for row in rows():
            assert isinstance(row.record, LabelRecord)
            classes.add(row.record, row)
        found = classes.problems(self._dataset.conversion)
        problems = {label: problem for label, _, problem in found}

        def label(row: Converted) -> str:
            return row.record.label if isinstance(row.record, LabelRecord) else ""

        with closing(Notes(refused)) as notes:
            for row in rows() if problems else ():
                if label(row) in problems:
                    notes.add(place=row.place, problem=problems[label(row)])
        return lambda: (row for row in rows() if label(row) not in problems), notes.count

    def _mined(self, rows: Rows, total: int) -> tuple[Iterable[Converted], dict[str, Any] | None]:
        """The rows up to the cap, with negatives and the miner's report where the set is mined."""
        dataset = self._dataset
        mining = mining_of(dataset, self._build)
        if mining is None:
            shown = _shown(capped(rows, total, dataset), f"{dataset.name}: write", None)
            return shown, None
        return mined(
            dataset,
            mining.model_copy(update={"dtype": self._context.teacher_dtype}),
            lambda: capped(rows, total, dataset),
            rows if dataset.max_records and dataset.max_records < total else None,
            work=self._mining,
            base_dir=self._context.base_dir,
        )


def set_places(folder: Path, name: str) -> tuple[Path, Path, Path]:
    """Where a set goes, where its bad rows are listed if there are too many, and its steps."""
    return folder / name, folder / f"{name}.{_REFUSED}", folder / ".steps" / name


def _step_name(step: str, *key: Any) -> str:
    return f"{step}-{content_hash(*key)[:16]}"


def _shown(rows: Iterable[Converted], description: str, total: int | None) -> Iterator[Converted]:
    """Yield the rows with a progress bar."""
    with progress(total, description) as bar:
        for number, row in enumerate(rows, start=1):
            yield row
            if number % _BAR_ROWS == 0:
                bar.advance(_BAR_ROWS)
