"""A small valid checkpoint on disk, for every test of this folder."""

import pytest
from small_checkpoint_files import write_checkpoint


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory):
    """Never written to; copy it to change it."""
    return write_checkpoint(tmp_path_factory.mktemp("small") / "checkpoint")
