"""For the page of the Python interface: in a docstring, a line that begins with the name of a parameter begins a paragraph."""

import re

import griffe


class Parameters(griffe.Extension):
    def on_object(self, *, obj, **_):
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"\n(?=\w+(?:, \w+)*: )", "\n\n", obj.docstring.value)
