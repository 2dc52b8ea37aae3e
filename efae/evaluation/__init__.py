"""Measurements of a model: reconstruction, equivariance, flow."""
