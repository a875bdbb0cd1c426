"""What the tests of scripts/generate.py share."""

import json

PROMPTS = ("Call me Ishmael.", "a", "It was the best of times", "x = 1\ny = x")


def prompt_flags(prompts=PROMPTS):
    return [f"--prompt={prompt}" for prompt in prompts]


def records(path):
    """Finished requests in the order of the prompts; the file has them in the order in which they finished."""
    return sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda record: record["index"])
