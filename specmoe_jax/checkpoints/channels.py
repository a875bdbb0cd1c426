"""The channels of gpt-oss: what it thinks, what it calls and what it answers, told apart by special tokens in its text."""

import re

_PART = re.compile(r"<\|channel\|>(.*?)<\|message\|>(.*?)(?=<\|(?:end|return|call|start|channel)\|>|\Z)", re.S)


def split_channels(text: str) -> dict[str, str]:
    """The text of each channel, in the order in which they begin; {} for a text without channels.

    >>> split_channels("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.")
    {'analysis': 'Hm.', 'final': 'Yes.'}
    """
    channels: dict[str, str] = {}
    for header, body in _PART.findall(text):
        name = (header.split() or [""])[0]
        channels[name] = channels.get(name, "") + body
    return channels
