"""The driver's part of one run, from a configuration to a registered model.

The driver holds no state: all that a later driver needs to resume is in storage and in MLflow,
under the name of the run.
"""
