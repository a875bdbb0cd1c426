"""The CPU kernels beside their jnp twins, their peers and the machine's limits, in interleaved rounds with cold caches.

Prints tables; the last stdout line is one JSON document. Ratios are medians of the ratios within a round: only those hold between
runs. A peer that does not load here is named once, with the reason, and has no column.
"""

from _run import run

if __name__ == "__main__":
    run("benchmark_kernels")
