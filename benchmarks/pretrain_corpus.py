"""The text that the project's small decoder is pretrained on.

Three kinds of documents are read, all under permissive licences:

- `doc`: every docstring of an installed package, rendered as the demo renders its documents: the
  signature line, then the text. Source: the `.py` files of the standard library and of the
  packages in the given site-packages folders whose metadata name a BSD, MIT, Apache, PSF, ISC or
  HPND licence.
- `prose`: the `.rst`, `.md` and `.txt` files and package descriptions of the same packages, and
  the texts of `shared/data/train` whose licence the manifest puts in class A.
- `source`: a sample of the raw source files, comments included.

Modules that `pydocs.split.held_out` holds out are never read into the corpus, and no
docstring paragraph of theirs (from 60 characters on) that another module repeats is kept; a source
file that repeats one is left out. Paragraphs and files are de-duplicated exactly.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import inspect
import json
import multiprocessing
import random
import re
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

from pydocs.split import held_out, module_name

PERMISSIVE = re.compile(r"\b(0?BSD|MIT|Apache|PSF|Python Software Foundation|ISC|HPND)\b", re.I)
RESTRICTED = re.compile(r"\b(A?L?GPL|MPL|Mozilla|EUPL|CC-BY-NC|proprietary)", re.I)
SKIPPED_FOLDERS = frozenset(
    [
        "tests",
        "test",
        "testing",
        "_vendor",
        "vendor",
        "vendored",
        "_vendored",
        "externals",
        "extern",
        "third_party",
        "idlelib",
        "site-packages",
        "lib2to3",
        "__pycache__",
        "node_modules",
        "locale",
        "turtledemo",
        "ensurepip",
        "licenses",
    ]
)
MIN_DOC_CHARACTERS = 60
MIN_PARAGRAPH_CHARACTERS = 60
MAX_SOURCE_CHARACTERS = 12_000
MAX_PROSE_CHARACTERS = 60_000
MAX_PACKAGE_SHARE = 0.12
"""Largest share of one package in the characters of a kind."""


@dataclass(frozen=True)
class Document:
    """One document of the corpus, before tokenisation."""

    source: str
    license: str
    kind: str
    text: str


@dataclass(frozen=True)
class SourceFile:
    """A file to read, with what the manifest has to say about it."""

    package: str
    license: str
    path: Path
    root: Path


@dataclass(frozen=True)
class ReadFile:
    """What one source file gave: documents, or (held out) only paragraphs to avoid."""

    documents: tuple[Document, ...]
    held_out_paragraphs: frozenset[bytes]


def package_license(metadata: str) -> str | None:
    """Return the licence a package's metadata names, or None where it is not permissive.

    The licence expression counts first, then the trove classifiers, then the licence field's
    first line. A package that names a copyleft licence anywhere among them is refused; the GPL
    run-time libraries with the GCC exception that binary wheels bundle hold no text of ours.
    """
    headers = HeaderParser().parsestr(metadata)
    classifiers = [
        value.rsplit("::", 1)[-1].strip()
        for value in headers.get_all("Classifier", [])
        if value.startswith("License ::")
    ]
    field = (headers.get("License") or "").strip().splitlines()
    for stated in (headers.get("License-Expression"), "; ".join(classifiers), *field[:1]):
        if not stated:
            continue
        plain = re.sub(r"GPL\S* WITH GCC-exception\S*", "", stated)
        if RESTRICTED.search(plain):
            return None
        if PERMISSIVE.search(plain):
            return stated if len(stated) <= 80 else stated[:77] + "..."
    return None


def installed_files(site_packages: Path) -> Iterator[tuple[SourceFile, Path | None]]:
    """Yield the source files of every permissively licensed package of a site-packages folder.

    The second item is the package's metadata file on the first pair of a package, else None.
    """
    for info in sorted(site_packages.glob("*.dist-info")):
        metadata = info / "METADATA"
        record = info / "RECORD"
        if not metadata.exists() or not record.exists():
            continue
        text = metadata.read_text(encoding="utf-8", errors="replace")
        license_name = package_license(text)
        name = info.name.split("-", 1)[0]
        if license_name is None:
            continue
        yield SourceFile(name, license_name, metadata, site_packages), metadata
        for line in record.read_text(encoding="utf-8").splitlines():
            relative = Path(line.rsplit(",", 2)[0].strip('"'))
            if relative.suffix in {".py", ".rst", ".md", ".txt"} and wanted(relative):
                yield SourceFile(name, license_name, site_packages / relative, site_packages), None


def standard_library_files() -> Iterator[SourceFile]:
    """Yield the source files of the running Python's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if wanted(path.relative_to(root)):
            yield SourceFile("standard library", "PSF-2.0", path, root)


def wanted(relative: Path) -> bool:
    """Return whether a path holds text for the corpus: no tests, vendored copies or licences."""
    if ".." in relative.parts or SKIPPED_FOLDERS.intersection(relative.parts):
        return False
    if any(part.endswith(".dist-info") for part in relative.parts):
        return False
    name = relative.name.lower()
    return not name.startswith(("test_", "licen", "copying", "notice", "requirements", "top_level"))


def render_docstrings(tree: ast.Module, module: str) -> Iterator[str]:
    """Yield every documented object of a module as text: signature line, then docstring."""

    def visit(node: ast.AST, prefix: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                signature = f"{prefix}.{child.name}({ast.unparse(child.args)})"
                yield from render(child, signature)
            elif isinstance(child, ast.ClassDef):
                yield from render(child, f"class {prefix}.{child.name}")
                yield from visit(child, f"{prefix}.{child.name}")

    def render(node: ast.Module | ast.ClassDef | ast.FunctionDef, head: str) -> Iterator[str]:
        docstring = ast.get_docstring(node)
        if docstring and len(docstring) >= MIN_DOC_CHARACTERS:
            yield f"{head[:300]}\n{docstring}"

    yield from render(tree, f"module {module}")
    yield from visit(tree, module)


def paragraph_keys(text: str) -> Iterator[tuple[str, bytes]]:
    """Yield the paragraphs of a text, each with the key that says whether two are the same."""
    for paragraph in re.split(r"\n\s*\n", text):
        plain = " ".join(paragraph.split())
        yield paragraph, hashlib.blake2b(plain.encode("utf-8"), digest_size=12).digest()


def read_source_file(file: SourceFile) -> ReadFile:
    """Read one file into documents; an unreadable or unparsable file gives none."""
    try:
        text = file.path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ReadFile((), frozenset())
    if file.path.name == "METADATA":
        text = text.partition("\n\n")[2]
    if file.path.suffix != ".py":
        kept = text[:MAX_PROSE_CHARACTERS] if is_prose(text) else ""
        documents = [Document(file.package, file.license, "prose", kept)] if kept else []
        return ReadFile(tuple(documents), frozenset())
    module = module_name(file.path, file.root)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return ReadFile((), frozenset())
    rendered = list(render_docstrings(tree, module))
    if held_out(module):
        keys = (
            key
            for document in rendered
            for paragraph, key in paragraph_keys(document.partition("\n")[2])
            if len(paragraph) >= MIN_PARAGRAPH_CHARACTERS
        )
        return ReadFile((), frozenset(keys))
    documents = [Document(file.package, file.license, "doc", item) for item in rendered]
    if len(text) > 400:
        piece = text[:MAX_SOURCE_CHARACTERS]
        documents.append(Document(file.package, file.license, "source", piece))
    return ReadFile(tuple(documents), frozenset())


def is_prose(text: str) -> bool:
    """Return whether a text file holds prose rather than data, by its share of letters."""
    head = text[:MAX_PROSE_CHARACTERS]
    letters = sum(character.isalpha() or character == " " for character in head)
    return len(head) >= 200 and letters / len(head) >= 0.75


def class_a_documents(train_folder: Path) -> Iterator[Document]:
    """Yield the texts of the training files whose licence is in class A and no other class.

    Long texts are documents of their own; sentences are put together, twenty to a document.
    """
    manifest = json.loads((train_folder / "manifest.json").read_text(encoding="utf-8"))
    for name, entry in manifest.items():
        if "(class A)" not in entry["license"]:
            continue
        texts: dict[str, None] = {}
        with gzip.open(train_folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for line in lines:
                texts.update(dict.fromkeys(record_texts(json.loads(line))))
        long = [text for text in texts if len(text) >= 200]
        short = [text for text in texts if len(text) < 200]
        random.Random(name).shuffle(short)
        grouped = ["\n".join(short[start : start + 20]) for start in range(0, len(short), 20)]
        for text in [*long, *grouped]:
            yield Document(f"train/{name}", entry["license"], "prose", text)


def record_texts(record: dict[str, object]) -> Iterator[str]:
    """Yield the texts of one training record, whatever its kind; labels and scores are none."""
    for key in ("query", "positive", "positives", "negative", "negatives", "sentence1",
                "sentence2", "text"):  # fmt: skip
        value = record.get(key)
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            yield from (item for item in value if isinstance(item, str))


def repeats_any(source: str, avoided: frozenset[bytes]) -> bool:
    """Return whether raw source holds one of the paragraphs, in a docstring or elsewhere.

    A docstring's first and last paragraph touch code and quotes, so the text between triple quotes
    is looked at on its own.
    """
    pieces = [source, *re.split(r"\"{3}|'{3}", source)]
    return any(key in avoided for piece in pieces for _, key in paragraph_keys(piece))


def deduplicate(
    documents: Iterable[Document], avoided: frozenset[bytes] = frozenset()
) -> Iterator[Document]:
    """Yield the documents without the paragraphs that came before; nearly empty ones vanish.

    Source files count as one paragraph. The first line of a `doc` is its signature and always
    stays.

    Args:
        documents: All documents, in the order in which the first of two equal ones is kept.
        avoided: Keys of held-out paragraphs: they are dropped, as is a source file with one.
    """
    seen = set(avoided)
    for document in documents:
        if document.kind == "source":
            key = hashlib.blake2b(document.text.encode("utf-8"), digest_size=12).digest()
            if key not in seen and not repeats_any(document.text, avoided):
                seen.add(key)
                yield document
            continue
        head, newline, body = (
            document.text.partition("\n") if document.kind == "doc" else ("", "", document.text)
        )
        kept = []
        for paragraph, key in paragraph_keys(body):
            if len(paragraph) >= MIN_PARAGRAPH_CHARACTERS:
                if key in seen:
                    continue
                seen.add(key)
            kept.append(paragraph)
        text = inspect.cleandoc("\n\n".join(kept))
        if len(text) >= MIN_DOC_CHARACTERS:
            yield Document(document.source, document.license, document.kind, head + newline + text)


def limit_shares(documents: list[Document], source_share: float) -> list[Document]:
    """Cut the corpus to its weights: no package too large, raw source only a part.

    Args:
        documents: De-duplicated documents in a random order.
        source_share: Characters of raw source per character of the other two kinds.
    """
    totals = Counter[str]()
    for document in documents:
        totals[document.kind] += len(document.text)
    limits = {
        "doc": MAX_PACKAGE_SHARE * totals["doc"],
        "prose": MAX_PACKAGE_SHARE * (totals["doc"] + totals["prose"]),
    }
    used: dict[tuple[str, str], int] = defaultdict(int)
    kept = []
    for document in (item for item in documents if item.kind != "source"):
        key = (document.kind, document.source)
        if used[key] >= limits[document.kind]:
            continue
        used[key] += len(document.text)
        kept.append(document)
    allowed = source_share * sum(len(document.text) for document in kept)
    taken = 0
    for document in (item for item in documents if item.kind == "source"):
        key = ("source", document.source)
        if taken >= allowed:
            break
        if used[key] < MAX_PACKAGE_SHARE * allowed:
            used[key] += len(document.text)
            taken += len(document.text)
            kept.append(document)
    return kept


def collect(
    site_packages: list[Path], train_folder: Path | None, *, source_share: float, seed: int
) -> list[Document]:
    """Read, de-duplicate, weight and shuffle the whole corpus.

    Args:
        site_packages: Folders of installed packages; the standard library is always read.
        train_folder: `shared/data/train`, or None to leave those texts out.
        source_share: Characters of raw source per character of documentation and prose.
        seed: Order of the documents.
    """
    files = list(standard_library_files())
    known: set[str] = set()
    for folder in site_packages:
        names = set()
        for file, _ in installed_files(folder):
            names.add(file.package.lower())
            if file.package.lower() not in known:
                files.append(file)
        known |= names
    with multiprocessing.Pool(processes=2) as pool:
        read = pool.map(read_source_file, files, chunksize=64)
    documents = [document for item in read for document in item.documents]
    if train_folder is not None:
        documents += class_a_documents(train_folder)
    avoided = frozenset(key for item in read for key in item.held_out_paragraphs)
    random.Random(seed).shuffle(documents)
    kept = limit_shares(list(deduplicate(documents, avoided)), source_share)
    random.Random(seed + 1).shuffle(kept)
    return kept
