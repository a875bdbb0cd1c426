"""Plain text out of markup, and pieces joined to documents."""

import html.parser
import re

_BLOCKS = {"p", "div", "li", "dt", "dd", "tr", "br", "pre", "h1", "h2", "h3", "h4", "h5", "table", "ul", "ol", "section"}
_SKIPPED = {"script", "style", "nav", "head", "footer", "header", "svg", "button"}


class _Text(html.parser.HTMLParser):
    """Collects what a reader sees; lines of <pre> are kept, all others are filled."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts, self.skipped, self.kept = [], 0, 0

    def handle_starttag(self, tag, attrs):
        self.skipped += tag in _SKIPPED
        self.kept += tag == "pre"
        if tag in _BLOCKS:
            self.parts.append("\n\n" if tag[0] in "ph" else "\n")

    def handle_endtag(self, tag):
        self.skipped = max(0, self.skipped - (tag in _SKIPPED))
        self.kept = max(0, self.kept - (tag == "pre"))
        if tag in _BLOCKS:
            self.parts.append("\n\n" if tag[0] in "ph" else "\n")

    def handle_data(self, text):
        if self.skipped:
            return
        if not self.kept:
            text = re.sub(r"\s+", " ", text)
            text = text.lstrip() if not self.parts or self.parts[-1].endswith("\n") else text
        self.parts.append(text)


def from_html(page: str) -> str:
    parser = _Text()
    parser.feed(page)
    text = re.sub(r"[ \t]+\n", "\n", "".join(parser.parts)).replace("¶", "").replace("\xa0", " ")
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def unwrapped(paragraph: str) -> str:
    """A hard-wrapped paragraph as one line."""
    return re.sub(r"\s*\n\s*", " ", paragraph).strip()


def paragraphs(text: str) -> list[str]:
    return [p for p in re.split(r"\n\s*\n", text) if p.strip()]


def blocks(pieces, size: int, separator: str = "\n\n") -> list[str]:
    """Contiguous pieces joined to documents of at least `size` characters."""
    out, current, length = [], [], 0
    for piece in pieces:
        current.append(piece)
        length += len(piece)
        if length >= size:
            out.append(separator.join(current))
            current, length = [], 0
    return out + ([separator.join(current)] if current else [])


def pair(question: str, answer: str) -> str:
    """A prompt and what answers it, in the form that all pairs share."""
    return f"Question: {question}\nAnswer: {answer}"
