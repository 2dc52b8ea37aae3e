"""MLflow: the run, and the thread that sends its metrics."""
