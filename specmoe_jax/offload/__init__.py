"""Where experts are and how they move: pure plans (residency), and the one place that copies (store)."""
