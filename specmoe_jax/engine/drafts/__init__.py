"""The parts of drafts that need the engine."""
