"""Text that arrives in pieces, wrapped at the width of a terminal as it comes."""

from typing import TextIO

WIDTH = 80


class WrappedText:
    """A context. indent: of each line. Whole words go on a new line, and whatever space there is between two is one space."""

    def __init__(self, out: TextIO, *, indent: str = ""):
        self._out, self._indent, self._word, self._at = out, indent, "", 0

    def __enter__(self) -> "WrappedText":
        return self

    def __exit__(self, *_) -> None:
        self._flush_word()
        self._out.write("\n\n")
        self._out.flush()

    def write(self, text: str) -> None:
        """What is complete of it appears at once."""
        for character in text:
            if character.isspace():
                self._flush_word()
            else:
                self._word += character
        self._out.flush()

    def _flush_word(self) -> None:
        if not self._word:
            return
        if self._at == 0:
            self._out.write(self._indent + self._word)
            self._at = len(self._indent) + len(self._word)
        elif self._at + 1 + len(self._word) > WIDTH:
            self._out.write("\n" + self._indent + self._word)
            self._at = len(self._indent) + len(self._word)
        else:
            self._out.write(" " + self._word)
            self._at += 1 + len(self._word)
        self._word = ""
