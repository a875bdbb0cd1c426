"""Pure models: layers, routing, one file per family. No offloading, no speculation."""
