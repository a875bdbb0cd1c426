"""Checks the installation and lists what is missing: versions, the C++ kernels, devices, memory kinds, the bundled model."""

from _run import run

if __name__ == "__main__":
    run("doctor")
