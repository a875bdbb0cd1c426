"""Continuations of held-out prompts, and how much they repeat themselves."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from specmoe_jax.training.witness import rollouts


def repeated_share(tokens: np.ndarray, size: int = 8) -> float:
    """Share of the n-grams of a continuation that it holds already, 0 where it is shorter than one. tokens [n]."""
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def beginnings(held_out: pathlib.Path, count: int, size: int = 160) -> list[str]:
    """The first words of held-out documents, as many of each corpus as go around."""
    files = sorted(held_out.glob("*.txt"))
    documents = [path.read_text().split("\f") for path in files]
    chosen = [documents[i % len(files)][(i // len(files)) % len(documents[i % len(files)])] for i in range(count)]
    return [text[:size].rsplit(" ", 1)[0] for text in chosen]


def report(
    params, bias, prompts: list[str], tokenizer: pathlib.Path, *, config, count: int, temperature: float, seed: int = 0
) -> dict:
    """Continuations of `count` tokens as text, and the mean share of repeated 8-grams."""
    coder = tokenizers.Tokenizer.from_file(str(tokenizer))
    encoded = [coder.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
    rows = np.zeros((len(encoded), max(map(len, encoded)) + count), np.int32)
    for row, ids in zip(rows, encoded, strict=True):
        row[: len(ids)] = ids
    lengths = jnp.array([len(ids) for ids in encoded])
    temperatures = jnp.full(len(rows), temperature, jnp.float32)
    drawn = np.asarray(
        rollouts.continued(params, bias, rows, lengths, jax.random.key(seed), temperatures, config=config, count=count)
    )
    return {
        "repeated_8_grams": round(float(np.mean([repeated_share(row) for row in drawn])), 4),
        "texts": [{"prompt": p, "continuation": coder.decode(row.tolist())} for p, row in zip(prompts, drawn, strict=True)],
    }
