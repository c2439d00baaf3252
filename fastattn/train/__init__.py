"""Training runs: text and puzzles, their data, state and report."""
