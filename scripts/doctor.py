"""Checks the installation: versions, the C++ kernels, devices, memory kinds, the bundled model. Says what is missing."""

from _run import run

if __name__ == "__main__":
    run("doctor")
