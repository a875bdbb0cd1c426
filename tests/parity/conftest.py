"""Live comparison with the reference implementation: skipped, with a message, where it is not installed."""

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if "parity" in item.path.parts:
            item.add_marker(pytest.mark.parity)
