"""Random kills through a run, and the proof that nothing was lost."""
