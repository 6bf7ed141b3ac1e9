"""Queries as people would type them, made from a summary line by rules.

Enters: the summary of a documented definition ("Return the minimum of an array along an axis.").
Leaves: the summary itself, a question ("How can I get the minimum of an array along an axis?") or
keywords ("minimum array axis"). No model is involved; the same seed gives the same queries.
`dataset.py` pairs them with documents that do not hold the summary.

The rules change the wording on purpose (other verbs, parts left out): people who search do not
know the words of the documentation. They never look at the document.
"""

from __future__ import annotations

import random
import re
from typing import Literal

QueryStyle = Literal["summary", "question", "keywords"]
QUERY_STYLES: tuple[QueryStyle, ...] = ("summary", "question", "keywords")

MAX_KEYWORDS = 6
MIN_KEYWORDS = 2

# Verbs that open summaries, each with what somebody with the problem might say instead.
VERBS: dict[str, tuple[str, ...]] = {
    "add": ("add", "append"),
    "adjust": ("adjust", "change"),
    "aggregate": ("aggregate", "summarise"),
    "append": ("append", "add"),
    "apply": ("apply", "use"),
    "assert": ("check", "make sure"),
    "assign": ("assign", "set"),
    "build": ("build", "create", "make"),
    "calculate": ("calculate", "compute", "get"),
    "call": ("call", "run"),
    "cast": ("cast", "convert"),
    "change": ("change", "modify"),
    "check": ("check", "find out", "test"),
    "clear": ("clear", "empty"),
    "clip": ("clip", "limit"),
    "close": ("close",),
    "collect": ("collect", "gather"),
    "combine": ("combine", "merge", "join"),
    "compare": ("compare",),
    "compute": ("compute", "calculate", "get", "find"),
    "concatenate": ("concatenate", "join"),
    "configure": ("configure", "set up"),
    "construct": ("construct", "build", "make"),
    "convert": ("convert", "turn", "transform"),
    "copy": ("copy", "duplicate"),
    "count": ("count",),
    "create": ("create", "make", "build"),
    "decode": ("decode",),
    "decompose": ("decompose", "factor"),
    "define": ("define", "declare"),
    "delete": ("delete", "remove"),
    "detect": ("detect", "find"),
    "determine": ("determine", "find out", "tell"),
    "display": ("display", "show"),
    "download": ("download", "fetch"),
    "drop": ("drop", "remove"),
    "draw": ("draw", "plot"),
    "encode": ("encode",),
    "ensure": ("ensure", "make sure"),
    "estimate": ("estimate",),
    "evaluate": ("evaluate", "compute"),
    "execute": ("execute", "run"),
    "expand": ("expand", "extend"),
    "export": ("export", "save"),
    "extract": ("extract", "get"),
    "fill": ("fill", "replace"),
    "filter": ("filter", "select"),
    "find": ("find", "get", "look up"),
    "fit": ("fit", "train"),
    "format": ("format",),
    "generate": ("generate", "create", "make"),
    "get": ("get", "obtain", "find"),
    "give": ("get",),
    "group": ("group",),
    "handle": ("handle", "deal with"),
    "initialize": ("initialize", "set up"),
    "insert": ("insert", "add"),
    "interpolate": ("interpolate",),
    "invert": ("invert", "reverse"),
    "iterate": ("iterate", "loop"),
    "join": ("join", "combine"),
    "limit": ("limit", "restrict"),
    "list": ("list", "get"),
    "load": ("load", "read"),
    "log": ("log", "record"),
    "make": ("make", "create"),
    "map": ("map", "apply"),
    "mark": ("mark",),
    "merge": ("merge", "combine"),
    "modify": ("modify", "change"),
    "multiply": ("multiply",),
    "normalize": ("normalize", "scale"),
    "obtain": ("obtain", "get"),
    "open": ("open",),
    "parse": ("parse", "read"),
    "perform": ("perform", "do", "run"),
    "plot": ("plot", "draw", "show"),
    "predict": ("predict", "estimate"),
    "prepare": ("prepare", "set up"),
    "print": ("print", "show"),
    "process": ("process", "handle"),
    "produce": ("produce", "create", "get"),
    "provide": ("provide", "get"),
    "push": ("push", "upload"),
    "raise": ("raise", "throw"),
    "read": ("read", "load"),
    "receive": ("receive", "get"),
    "reduce": ("reduce", "shrink"),
    "register": ("register", "add"),
    "remove": ("remove", "delete", "get rid of"),
    "rename": ("rename", "change the name of"),
    "render": ("render", "draw"),
    "repeat": ("repeat",),
    "replace": ("replace", "swap"),
    "represent": ("represent", "describe"),
    "resample": ("resample",),
    "reset": ("reset", "restore"),
    "reshape": ("reshape", "change the shape of"),
    "resize": ("resize", "change the size of"),
    "resolve": ("resolve", "find"),
    "retrieve": ("retrieve", "get", "fetch"),
    "return": ("get", "find", "obtain"),
    "reverse": ("reverse", "flip"),
    "rotate": ("rotate", "turn"),
    "round": ("round",),
    "run": ("run", "execute"),
    "sample": ("sample", "draw"),
    "save": ("save", "store", "write"),
    "scale": ("scale", "rescale"),
    "search": ("search", "look"),
    "select": ("select", "pick", "choose"),
    "send": ("send",),
    "serialize": ("serialize", "save"),
    "set": ("set", "change"),
    "shift": ("shift", "move"),
    "show": ("show", "display"),
    "shuffle": ("shuffle", "randomise"),
    "simplify": ("simplify", "reduce"),
    "solve": ("solve",),
    "sort": ("sort", "order"),
    "specify": ("specify", "set"),
    "split": ("split", "divide"),
    "start": ("start", "begin"),
    "stop": ("stop", "end"),
    "store": ("store", "save", "keep"),
    "subtract": ("subtract",),
    "sum": ("sum", "add up"),
    "take": ("take", "pick"),
    "test": ("test", "check"),
    "tokenize": ("tokenize", "split into tokens"),
    "train": ("train", "fit"),
    "transform": ("transform", "convert"),
    "translate": ("translate", "convert"),
    "truncate": ("truncate", "cut off"),
    "unpack": ("unpack", "extract"),
    "update": ("update", "change"),
    "upload": ("upload",),
    "use": ("use",),
    "validate": ("validate", "check"),
    "verify": ("verify", "check"),
    "wait": ("wait",),
    "wrap": ("wrap",),
    "write": ("write", "save"),
    "yield": ("get", "iterate over"),
}

# Further verbs, for which people have no other word at hand.
_PLAIN_VERBS = frozenset(
    """
    acquire activate align allocate allow analyze approximate attach backpropagate binarize bind
    broadcast cache cancel capture choose classify collapse compile complete compress connect
    coerce consume convolve crop deactivate declare decrease delegate detach dequantize
    deserialize differentiate disable dispatch divide downsample dump embed emit enable encrypt
    enqueue enter enumerate escape exit extend factor fetch flatten flush force forward freeze
    fuse gather hash help hide hold identify implement import increase indicate infer inspect
    install instantiate integrate intersect invoke iterate keep launch learn link locate lock
    look lookup manage mask match maximize measure migrate minimize move notify optimize order
    override pad partition patch permute pick place pop post-process postprocess preprocess
    project prune publish put quantize query rank rebuild recompute reconstruct record recover
    redirect refine release reload reorder report request rescale restore rewrite roll schedule
    segment serve simulate skip slice smooth stack standardize strip submit substitute suppress
    swap switch synchronize tile trace track transpose traverse try tune uninstall unregister
    unwrap upsample visit visualize walk warn watch
    """.split()  # noqa: SIM905 - a word list reads best as text
)

_ACTION_TEMPLATES = (
    "How do I {verb} {object}?",
    "How can I {verb} {object}?",
    "how to {verb} {object}",
    "How to {verb} {object} in Python?",
    "Is there a way to {verb} {object}?",
    "I want to {verb} {object}",
    "What should I use to {verb} {object}?",
    "{kind} to {verb} {object}",
)
_TEST_TEMPLATES = (
    "How do I check {object}?",
    "How can I tell {object}?",
    "how to find out {object}",
    "Is there a way to test {object}?",
)
_THING_TEMPLATES = (
    "What can I use for {object}?",
    "Is there {object}?",
    "Where do I find {object}?",
    "I am looking for {object}",
    "{kind} for {object}",
    "Which {kind} gives me {object}?",
)
_STOP_WORDS = frozenset(
    """
    a an and any are as at be been being but by can could do does done each either else every for
    from given had has have here how i if in instead into is it its itself just may might must no
    not of on one only onto or other others otherwise own per rather same shall should so some
    such than that the their them then there these they this those through to too under until
    upon use used uses using very via was we were what when where whether which while who will
    with within without would you your also return returns
    """.split()  # noqa: SIM905 - a word list reads best as text
)
_TRUTH = re.compile(
    r"^(?:return|check|test|determine)s?\s+(?:true\s+)?(?:if|whether)\b\s*", re.IGNORECASE
)
_SUBJECT = re.compile(
    r"^(?:this|the) (?:function|method|class|module|decorator|operator|routine)"
    r"(?: (?:can be|is) used to| will| can)?\s+",
    re.IGNORECASE,
)
_DANGLING = re.compile(r"(?: (?:into|of|in|for|with|to|by|from|and|or|as|the|a|on))+$")
_ASIDE = re.compile(r"\s*\([^()]*\)|\s*\[[^\[\]]*\]")
_TAIL = re.compile(
    r"(?:;|:\s| -+ |, (?:and|or|but|which|where|with|using|if|e\.g|i\.e|such as|for example)\b).*$"
)


def make_query(summary: str, style: QueryStyle, rng: random.Random, *, is_class: bool) -> str:
    """Return a query for the definition that `summary` describes.

    Args:
        summary: One sentence of plain text.
        style: ``summary`` gives the sentence, ``question`` what somebody would ask, ``keywords``
            what somebody would type into a search box.
        rng: Chooses templates, verbs and which words are left out.
        is_class: Whether a class is described and not a function.
    """
    if style == "summary":
        return summary.rstrip(" .")
    if style == "question":
        return question(summary, rng, is_class=is_class)
    return keywords(summary, rng)


def question(summary: str, rng: random.Random, *, is_class: bool) -> str:
    """Turn a summary into a question.

    "Compute the mean." becomes "How do I calculate the mean?", "Check if x is odd." "How can I tell
    if x is odd?" and, without a verb in front, "A sparse matrix." "Is there a sparse matrix?".
    Parts in brackets and trailing clauses are left out.
    """
    kind = "class" if is_class else "function"
    text = _core(summary)
    truth = _TRUTH.match(text)
    if truth:
        claim = f"{rng.choice(('if', 'whether'))} {text[truth.end() :]}"
        return rng.choice(_TEST_TEMPLATES).format(object=claim)
    verb, what = split_verb(text)
    if verb is not None and what:
        template = rng.choice(_ACTION_TEMPLATES)
        said = rng.choice(VERBS.get(verb, (verb,)))
        return template.format(verb=said, object=what, kind=kind)
    return rng.choice(_THING_TEMPLATES).format(object=_lower_first(text), kind=kind)


def keywords(summary: str, rng: random.Random) -> str:
    """Return the words that carry the meaning, in order, lower-cased, at most `MAX_KEYWORDS`.

    Where there are more, those to leave out are drawn. A leading verb is left out half of the time.
    """
    words = re.findall(r"\w[\w.+#-]*\w|\w", _core(summary))
    if len(words) > MIN_KEYWORDS + 1 and base_verb(words[0]) and rng.random() < 0.5:
        words = words[1:]
    lower = [word.lower() for word in words]
    meant = (w for w in lower if (len(w) > 1 or w.isdigit()) and w not in _STOP_WORDS)
    kept = list(dict.fromkeys(meant))
    if len(kept) < MIN_KEYWORDS:
        return " ".join(lower)
    while len(kept) > MAX_KEYWORDS:
        del kept[rng.randrange(len(kept))]
    return " ".join(kept)


def split_verb(text: str) -> tuple[str | None, str]:
    """Split "Lazily computes the sum" into ("compute", "the sum lazily"), or (None, ...)."""
    first, _, rest = text.partition(" ")
    if first.lower().endswith("ly"):
        second, _, remainder = rest.partition(" ")
        if base_verb(second):
            return base_verb(second), f"{remainder} {first.lower()}".strip()
    return base_verb(first), rest.strip()


def base_verb(word: str) -> str | None:
    """Return the infinitive if `word` is a verb known here, also in the third person; else None."""
    lower = word.lower()
    candidates = [lower, lower.removesuffix("s"), lower.removesuffix("es")]
    if lower.endswith("ies"):
        candidates.append(lower[:-3] + "y")
    return next((word for word in candidates if word in VERBS or word in _PLAIN_VERBS), None)


def _core(summary: str) -> str:
    """Cut "This function", bracketed asides and trailing clauses, where enough is left."""
    text = _ASIDE.sub("", summary).strip(" .:")
    text = _DANGLING.sub("", _SUBJECT.sub("", text))
    short = _TAIL.sub("", text).strip(" .,")
    return short if len(short.split()) >= 4 else text


def _lower_first(text: str) -> str:
    """Lower the first letter unless the word is a name such as DFT or DataFrame."""
    first = text.split(" ", 1)[0]
    return text if any(c.isupper() for c in first[1:]) else text[:1].lower() + text[1:]
