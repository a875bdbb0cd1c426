"""The README.md of a carved checkpoint: what it is, and what it is not."""


def card(title: str, licence: str | None, sizes, report) -> str:
    """sizes: carve.Sizes; report: carve_checkpoint.Report."""
    head = f"---\nlicense: {licence}\n---\n" if licence else ""
    return f"""{head}# Carved from {title}

A mixture of experts in Qwen2-MoE format, cut out of a dense checkpoint by `specmoe carve` of specmoe_jax.
**The routing is carved, not trained**: no weight was ever changed by a gradient. In each layer the {sizes.shared} neurons
with the largest mean contribution are the shared expert, the others {sizes.experts} balanced clusters, of which a token takes
{sizes.top_k}; the router is a ridge regression from the layer's input to how much each cluster adds. It is made to exercise an
engine with a real vocabulary and real text, not to be better than its source: it computes {sizes.top_k} of {sizes.experts} parts
of the same sum.

| perplexity of the held-back third of the calibration text | |
|---|---|
| dense source | {report.dense:.3f} |
| carved | {report.carved:.3f} |

{report.calibration_tokens} tokens calibrated the cut, {report.measured_tokens} others measured it. Weights and tokenizer are the
source's and under its licence{f" ({licence})" if licence else ""}.
"""
