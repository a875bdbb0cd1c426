"""A request from prompt to completion: preparation, end conditions, text."""
