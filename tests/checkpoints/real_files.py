"""Where published files lie that are not kept here: SPECMOE_REAL, or shared/real beside the repository; None elsewhere."""

import os
import pathlib

_NAMED = os.environ.get("SPECMOE_REAL")
_BESIDE = pathlib.Path(__file__).parents[3] / "shared" / "real"
REAL = pathlib.Path(_NAMED) if _NAMED else _BESIDE if _BESIDE.is_dir() else None
