"""Infrastructure for EFAE: the local stack of `make up` (S3, MLflow, a Ray head on loopback)."""
