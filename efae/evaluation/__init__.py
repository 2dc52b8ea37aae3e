"""What is measured about a model."""
