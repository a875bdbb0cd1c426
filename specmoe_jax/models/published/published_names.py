"""Names as checkpoints are published under them -> names as the specs spell them: base classes, wrappers, buffers."""

from collections.abc import Callable, Collection

OWN = "model."  # what the specs put before everything but the output matrix
BODIES = (OWN, "", "language_model.model.", "model.language_model.")  # a language model, a base class, text parts of wrappers
OTHER_PARTS = (
    "vision_model.", "vision_tower.", "visual.", "multi_modal_projector.", "model.visual.", "model.vision_tower.",
    "model.multi_modal_projector.",
)  # fmt: skip
BUFFERS = ("rotary_emb.inv_freq", ".k_scale", ".v_scale")  # computed from the config, or of a quantised KV cache: not used
HEAD = "lm_head.weight"


def spelling_of(names: Collection[str], embedding: str) -> Callable[[str], str | None]:
    """A function from stored names to those of the specs; None for what the text part does not use.

    embedding: the specs' name of the token embedding, by whose stored name the prefix of all others is told.
    """
    body = next((body for body in BODIES if body + embedding.removeprefix(OWN) in names), OWN)

    def canonical(name: str) -> str | None:
        if name.endswith(BUFFERS):
            return None
        if name.removeprefix("language_model.") == HEAD:
            return HEAD
        if body == OWN:
            return name
        if body and name.startswith(OTHER_PARTS):
            return None
        return OWN + name.removeprefix(body) if name.startswith(body) else name

    return canonical
