"""A few phrases and spellings are rare in everything that a person reads."""

import ast
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PHRASES = {
    "those of|that of": 10,
    "is no": 10,
    "told|tells": 3,
    "nobody|somebody": 2,
    "beside": 0,
    "what is": 25,
    "behind": 12,
    "in place of": 0,
    "so many": 0,
    "as many": 10,
    "shall|anew|likeliest|mend": 0,
}
"""Largest total number of occurrences of each phrase. They are English, but a native speaker rarely needs them."""
BRITISH = (
    r"\b\w*(?:colour|behaviour|neighbour|favour|honour|centre|metre(?!d)|licence|analys(?:e|ed|es|ing)\b|catalogue|grey\b|"
    r"labelled|labelling|cancelled|modelled|modelling|travell|artefact|fulfil\b|programme\b|"
    r"(?:normal|optim|initial|serial|organ|recogn|quant|minim|maxim|general|special|random|material|factor|regular|"
    r"visual|summar|util|emphas|synchron|real|character|local|vector|parallel)is(?:e|ed|es|er|ers|ing|ation)\b)\w*"
)


def files(*suffixes):
    places = [ROOT / "src", ROOT / "docs", ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    matches = [path for place in places for path in ([place] if place.is_file() else place.rglob("*"))]
    return sorted(path for path in matches if path.suffix in suffixes and "_build" not in path.parts)


def text_of(path):
    """Return what a person reads: all of a file, or the cells of a notebook without their output."""
    if path.suffix != ".ipynb":
        return path.read_text()
    return "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"])


def test_files_are_found():
    assert len(files(".py", ".md")) > 200
    assert len(files(".ipynb")) >= 5


@pytest.mark.parametrize("phrase", PHRASES)
def test_phrases_are_rare(phrase):
    pattern = re.compile(rf"\b(?:{phrase.replace(' ', chr(92) + 's+')})\b", re.IGNORECASE)
    matches = [
        f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}"
        for path in files(".py", ".md", ".ipynb")
        for text in [text_of(path)]
        for match in pattern.finditer(text)
    ]
    assert len(matches) <= PHRASES[phrase], "\n".join(matches)


def test_spelling_is_american():
    others = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("*"), *(ROOT / "configs").rglob("*.yaml")]
    matches = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in [*files(".py", ".md", ".ipynb"), *others, ROOT / "CHANGELOG.md"]
        if path.is_file() and path.suffix in (".py", ".md", ".ipynb", ".yaml") and path.name != Path(__file__).name
        for match in re.finditer(BRITISH, text_of(path), re.IGNORECASE)
    ]
    assert matches == []


def attribute_docstrings(tree):
    """Yield the strings that stand below an assignment, as Sphinx reads them."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement, below in pairwise(body if isinstance(body, list) else []):
            is_string = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if isinstance(statement, ast.Assign | ast.AnnAssign) and is_string and isinstance(below.value.value, str):
                yield below.lineno, below.value.value


def test_attribute_docstrings_stand_alone():
    matches = [
        f"{path.relative_to(ROOT)}:{line} {text}"
        for path in files(".py")
        for line, text in attribute_docstrings(ast.parse(path.read_text()))
        if re.match(r"(Of|Those|That of|By how|The same)\b", text)
    ]
    assert matches == []
