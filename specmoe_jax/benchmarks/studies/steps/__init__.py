"""What steps, prompts and scores cost beside their arithmetic, and two checkouts beside each other."""
