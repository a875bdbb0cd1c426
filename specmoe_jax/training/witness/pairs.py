"""Questions and answers made from documents that are trained on: a prompt then gets something that looks like an answer."""

import ast
import re

import numpy as np

from specmoe_jax.training.witness.texts import pair

PAIRS_A_DOCUMENT = 12
LONGEST = 900  # characters of an answer


def _cut(text: str) -> str:
    """Whole sentences of at most LONGEST characters."""
    text = text.strip()
    if len(text) <= LONGEST:
        return text
    end = max(text.rfind(mark, 0, LONGEST) for mark in (". ", ".\n", "; "))
    return text[: end + 1] if end > 200 else ""


def from_wordnet(document: str):
    for line in document.splitlines():
        found = re.match(r"([^(]+) \((noun|verb|adjective|adverb)\): (.*)", line)
        if found:
            words, part, gloss = found.groups()
            word = words.split(", ")[0]
            verb = "mean" if part != "noun" else ""
            yield pair(f"What does {word} {verb}?" if verb else f"What is {word}?", gloss)


def from_factbook(document: str):
    country, *fields = document.split("\n")
    for field in fields:
        name, _, text = field.partition(": ")
        # Shorter texts are figures, whose names ("total", "male") say nothing alone.
        if country and ":" not in country and len(text) > 60 and len(name) < 50:
            yield pair(f"What is the {name[0].lower() + name[1:]} of {country}?", text)


def from_devil(document: str):
    for found in re.finditer(r"^([A-Z][A-Z' -]+), (?:n|adj|v\.t|v\.i|adv)\.\s+([^\n]+)", document, re.MULTILINE):
        yield pair(f"What does the Devil's Dictionary say about {found[1].lower()}?", found[2])


def from_headings(document: str):
    """reStructuredText: an underlined title and the first paragraphs of prose under it."""
    for found in re.finditer(
        r"^(\S[^\n]{8,80})\n[=\-~^\"'*+#]{8,}\n+((?:(?![^\n]*\n[=\-~^]{4,})[A-Z`:*][^\n]+\n?(?:\S[^\n]*\n)*\n?){1,3})",
        document,
        re.MULTILINE,
    ):
        title, text = re.sub(r":\w+:`~?([^`]*)`", r"\1", found[1]).strip("`* "), found[2]
        if not text.startswith("..") and len(text) > 80:
            yield pair(title if title.endswith("?") else f"Explain: {title}.", text)


def from_code(document: str):
    """Functions: their signature and what their docstring says."""
    try:
        tree = ast.parse(document)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            text = ast.get_docstring(node)
            if text and len(text) > 60:
                arguments = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else ""
                if len(arguments) < 120:
                    yield pair(f"What does `{node.name}{arguments}` do in Python?", text)


MAKERS = {
    "wordnet": from_wordnet,
    "factbook": from_factbook,
    "devil": from_devil,
    "python_documentation": from_headings,
    "other_documentation": from_headings,
    "python_code": from_code,
}
# Of what a maker finds, one unless named: a second copy of WordNet would be too much of it.
SHARES = {"wordnet": 0.4}


def make(training: dict[str, list[str]], seed: int) -> list[str]:
    """Documents of PAIRS_A_DOCUMENT pairs of one source, from training documents alone."""
    rng, out = np.random.default_rng(seed), []
    for name, maker in MAKERS.items():
        found = [question for document in training[name] for question in maker(document)]
        found = [p for p in dict.fromkeys(map(_shortened, found)) if p]
        chosen = rng.permutation(len(found))[: int(len(found) * SHARES.get(name, 1.0))]
        out += [
            "\n\n".join(found[i] for i in chosen[start : start + PAIRS_A_DOCUMENT])
            for start in range(0, len(chosen), PAIRS_A_DOCUMENT)
        ]
    return out


def _shortened(text: str) -> str:
    question, answer = text.split("\nAnswer: ", 1)
    answer = _cut(answer)
    return f"{question}\nAnswer: {answer}" if answer else ""
