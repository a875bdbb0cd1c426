"""Small leaves without domain logic: errors, units, files, progress, timing, tracing."""
