"""Default data for each task, cut from the standard library's source: so every command runs with no download.

    classify     which family of modules a function comes from; unbalanced: a family of one in twenty, or another
    regress      how many ways lead through a function: 1 + its branches (McCabe 1976)
    tag          FUNCTION, CLASS, BASE, PARAMETER, CALL and STRING among the tokens of a function, in BIO
    seq2seq      a docstring to the name of its function, which it does not spell
    span-qa      what a function returns and raises, its first argument and its defaults; one in four is unanswerable
    chat         what a function does, and which arguments it takes
    preference   a function's own docstring before another one's
    lm           docstrings: prose, where a model of the library has read code above all

The records have the formats of files (see tasks.py), and are read by the same functions. They are the same for the same
Python and seed. Pieces of one module stand on both sides of a split: what is measured is how well a task is learnt from
such source, not how far that carries to other libraries.
"""

import ast
import io
import random
import tokenize
from collections.abc import Callable, Iterator
from typing import Any

from minillm.config import UserError
from minillm.data.records import Record
from minillm.data.stdlib_source import Function, functions, parsed

LIMIT = 3000
"""Examples of a task at most."""
PAIRS = 1500
"""Of `preference` at most: of each example two models read two texts."""
FAMILIES = {
    "archives": ("bz2", "gzip", "lzma", "shutil", "tarfile", "zipfile"),
    "async": ("asyncio/",),
    "imports": ("importlib/", "modulefinder", "pkgutil", "runpy", "zipimport"),
    "mail": ("email/", "imaplib", "mailbox", "poplib", "smtplib"),
    "numbers": ("_pydecimal", "_pydatetime", "calendar", "datetime", "fractions", "numbers", "random", "statistics"),
    "processes": ("concurrent/", "multiprocessing/", "subprocess", "threading"),
    "tests": ("doctest", "unittest/"),
    "web": ("html/", "http/", "socketserver", "urllib/", "wsgiref/", "xmlrpc/"),
    "xml": ("xml/",),
}
_PER_FAMILY = 300
_MINORITY, _MINORITY_SHARE = "imports", 0.05  # a family that is hard to tell: few words are its own
_SHOWN = 400  # characters of a function at most
_SENTENCE = 160  # characters of a docstring at most

Cut = tuple[Function, dict[str, Any]]


def stdlib_records(task: str, *, seed: int = 0, unbalanced: bool = False) -> list[Record]:
    """Up to 3,000 examples of a task, of `preference` 1,500, in random order.

    Args:
        unbalanced: for `classify`, two classes of which one is rare.

    Raises:
        UserError: a task that has no default data, or a Python without its library's source.
    """
    if task not in _TASKS or (unbalanced and task != "classify"):
        raise UserError(f"there is no default data for {task}{' unbalanced' * unbalanced}; name a file with --data")
    cut = _unbalanced if unbalanced else _TASKS[task]
    found = list(cut(functions(), random.Random(seed)))
    random.Random(seed).shuffle(found)
    return [
        Record(f"stdlib:{number} ({function.file}:{function.line})", fields)
        for number, (function, fields) in enumerate(found[: PAIRS if task == "preference" else LIMIT], 1)
    ]


def _family(function: Function) -> str | None:
    return next((family for family, files in FAMILIES.items() if function.file.startswith(files)), None)


def _snippets(all_of_them: tuple[Function, ...], generator: random.Random) -> dict[str, list[tuple[Function, str]]]:
    """Of each family (function, its first lines), in random order; no two texts are the same."""
    by_family: dict[str, list[tuple[Function, str]]] = {family: [] for family in FAMILIES}
    seen = set()
    for function in generator.sample(all_of_them, len(all_of_them)):
        family, text = _family(function), _first_lines(function.code)
        if family is not None and len(text) >= 80 and text not in seen:
            seen.add(text)
            by_family[family].append((function, text))
    return by_family


def _first_lines(code: str) -> str:
    return code if len(code) <= _SHOWN else code[: code.rfind("\n", 0, _SHOWN) + 1].rstrip()


def _classify(all_of_them: tuple[Function, ...], generator: random.Random) -> Iterator[Cut]:
    for family, snippets in _snippets(all_of_them, generator).items():
        for function, text in snippets[:_PER_FAMILY]:
            yield function, {"text": text, "label": family}


def _unbalanced(all_of_them: tuple[Function, ...], generator: random.Random) -> Iterator[Cut]:
    others = []
    by_family = _snippets(all_of_them, generator)
    for family, snippets in by_family.items():
        if family != _MINORITY:
            others += [(function, {"text": text, "label": "other"}) for function, text in snippets[:_PER_FAMILY]]
    rare = round(len(others) * _MINORITY_SHARE / (1 - _MINORITY_SHARE))
    yield from others
    for function, text in by_family[_MINORITY][:rare]:
        yield function, {"text": text, "label": _MINORITY}


def _regress(all_of_them: tuple[Function, ...], generator: random.Random) -> Iterator[Cut]:
    for function in _whole(all_of_them, generator, _SHOWN):
        if (node := parsed(function.code)) is not None:
            yield function, {"text": function.code, "label": float(1 + sum(map(_branches, ast.walk(node))))}


def _branches(node: ast.AST) -> int:
    if isinstance(node, ast.BoolOp):
        return len(node.values) - 1
    if isinstance(node, ast.comprehension):
        return 1 + len(node.ifs)
    kinds = ast.If | ast.IfExp | ast.For | ast.AsyncFor | ast.While | ast.ExceptHandler | ast.match_case
    return int(isinstance(node, kinds))


def _tag(all_of_them: tuple[Function, ...], generator: random.Random) -> Iterator[Cut]:
    for function in _whole(all_of_them, generator, _SHOWN):
        code = function.code
        if function.owner is not None:
            code = f"{function.owner}\n" + "\n".join("    " + line for line in code.split("\n"))
        if (node := parsed(code)) is not None:
            words, tags = _tagged(code, _named(node))
            if len(words) >= 5:
                yield function, {"tokens": words, "tags": tags}


def _named(tree: ast.AST) -> dict[tuple[int, int], tuple[str, tuple[int, int]]]:
    """(line, column) where a name begins -> (its kind, where it ends)."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            kind = "CLASS" if isinstance(node, ast.ClassDef) else "FUNCTION"
            before = {"ClassDef": "class ", "FunctionDef": "def ", "AsyncFunctionDef": "async def "}
            at = node.col_offset + len(before[type(node).__name__])
            found[node.lineno, at] = kind, (node.lineno, at + len(node.name))
            for base in getattr(node, "bases", ()):
                found[base.lineno, base.col_offset] = "BASE", (base.end_lineno, base.end_col_offset)
        elif isinstance(node, ast.arg):
            found[node.lineno, node.col_offset] = "PARAMETER", (node.lineno, node.col_offset + len(node.arg))
        elif isinstance(node, ast.Call) and _dotted(node.func):
            found[node.func.lineno, node.func.col_offset] = "CALL", (node.func.end_lineno, node.func.end_col_offset)
    return found


def _dotted(node: ast.AST) -> bool:
    """Whether it is a name, or names parted by dots."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)


def _tagged(code: str, named: dict[tuple[int, int], tuple[str, tuple[int, int]]]) -> tuple[list[str], list[str]]:
    words, tags = [], []
    kind, end = "O", (0, 0)
    shown = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type not in shown:
            continue
        prefix = "I"
        if token.start >= end:
            kind, end = named.get(token.start, ("O", (0, 0)))
            prefix = "B"
        string = token.type == tokenize.STRING
        words.append("'...'" if string and (" " in token.string or len(token.string) > 20) else token.string)
        words[-1] = "".join(words[-1].split())
        tags.append("B-STRING" if string else "O" if kind == "O" else f"{prefix}-{kind}")
    return words, tags


def _seq2seq(all_of_them: tuple[Function, ...], generator: random.Random) -> Iterator[Cut]:
    seen = set()
    for function in generator.sample(all_of_them, len(all_of_them)):
        text, bare = function.docstring, function.name.strip("_").lower()
        fits = 15 <= len(text) <= _SENTENCE and not function.name.startswith("__") and len(bare) > 2
        if fits and bare not in text.lower() and text not in seen:
            seen.add(text)
            yield function, {"source": text, "target": function.name}


def _span_qa(all_of_them: tuple[Function, ...], generator: random.Random) -> Iterator[Cut]:
    number = 0
    for function in _whole(all_of_them, generator, _SHOWN):
        if (node := parsed(function.code)) is None:
            continue
        asked = list(_questions(function, node))
        known = [question for question in asked if question[1] is not None]
        unknown = [question for question in asked if question[1] is None]
        for group in (known, unknown if generator.random() < 0.35 else []):
            if group:
                number += 1
                question, answer = generator.choice(group)
                yield function, _answered(f"stdlib-{number}", function.code, question, answer)


def _questions(function: Function, node: ast.FunctionDef) -> Iterator[tuple[str, ast.AST | None]]:
    """(question, the node that answers it, or None where nothing does)."""
    inside = list(ast.walk(node))
    returned = [n.value for n in inside if isinstance(n, ast.Return) and n.value is not None]
    raised = [n.exc.func if isinstance(n.exc, ast.Call) else n.exc for n in inside if isinstance(n, ast.Raise)]
    if len(returned) <= 1:
        yield f"What does {function.name} return?", returned[0] if returned else None
    if len(raised) <= 1 and None not in raised:
        yield f"Which exception does {function.name} raise?", raised[0] if raised else None
    arguments = [a for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls")]
    if arguments:
        yield f"What is the first argument of {function.name}?", arguments[0]
    missing = len(arguments) - len(node.args.defaults)
    for i, argument in enumerate(arguments):
        yield f"What is the default of {argument.arg}?", node.args.defaults[i - missing] if i >= missing else None


def _answered(key: str, context: str, question: str, answer: ast.AST | None) -> dict[str, Any]:
    answers = []
    if answer is not None:
        before = context.split("\n")[: answer.lineno - 1]
        start = sum(len(line) + 1 for line in before) + answer.col_offset
        name = getattr(answer, "arg", None)  # of an argument without its annotation
        text = name or ast.get_source_segment(context, answer)
        answers.append({"text": text, "answer_start": start})
    return {
        "id": key,
        "question": question,
        "context": context,
        "answers": answers,
        "is_impossible": answer is None,
    }


def _chat(all_of_them: tuple[Function, ...], generator: random.Random) -> Iterator[Cut]:
    for function in _documented(all_of_them, generator):
        if len(function.arguments) > 6:
            continue
        messages = [
            {"role": "user", "content": f"What does {function.name} in {function.module} do?"},
            {"role": "assistant", "content": function.docstring},
        ]
        if generator.random() < 0.5:
            signature = f"{function.name}({', '.join(function.arguments)})"
            messages[0]["content"] = f"What does {signature} in {function.module} do?"
            messages.append({"role": "user", "content": "Which arguments does it take?"})
            messages.append({"role": "assistant", "content": f"It takes {_listed(function.arguments)}."})
        yield function, {"messages": messages}


def _listed(names: tuple[str, ...]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else "none"


def _preference(all_of_them: tuple[Function, ...], generator: random.Random) -> Iterator[Cut]:
    shown = [function for function in _documented(all_of_them, generator) if len(function.code) <= _SHOWN]
    for function, other in zip(shown, shown[1:] + shown[:1], strict=True):
        if function.docstring != other.docstring:
            prompt = f"Write the docstring of this function.\n{function.code}"
            yield function, {"prompt": prompt, "chosen": function.docstring, "rejected": other.docstring}


def _lm(all_of_them: tuple[Function, ...], generator: random.Random) -> Iterator[Cut]:
    seen = set()
    for function in generator.sample(all_of_them, len(all_of_them)):
        if len(function.docstring) >= 15 and function.docstring not in seen:
            seen.add(function.docstring)
            yield function, {"text": function.docstring}


def _documented(all_of_them: tuple[Function, ...], generator: random.Random) -> list[Function]:
    """Functions with a docstring of ordinary length, in random order."""
    mixed = generator.sample(all_of_them, len(all_of_them))
    return [function for function in mixed if 15 <= len(function.docstring) <= _SENTENCE]


def _whole(all_of_them: tuple[Function, ...], generator: random.Random, longest: int) -> list[Function]:
    """Functions of up to `longest` characters, in random order: somewhat more than are wanted, since some give none."""
    mixed = generator.sample(all_of_them, len(all_of_them))
    return [function for function in mixed if 60 <= len(function.code) <= longest][: LIMIT + LIMIT // 4]


_TASKS: dict[str, Callable[[tuple[Function, ...], random.Random], Iterator[Cut]]] = {
    "classify": _classify,
    "regress": _regress,
    "tag": _tag,
    "seq2seq": _seq2seq,
    "span-qa": _span_qa,
    "chat": _chat,
    "preference": _preference,
    "lm": _lm,
}
