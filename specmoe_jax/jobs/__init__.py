"""Jobs that survive: journal, prompt files, progress, metrics file. Above the engine."""
