"""Random kills during a run, and the proof that the run loses nothing."""
