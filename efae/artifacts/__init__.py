"""What a run leaves behind: checkpoints, tracked metrics, registered models, the report card."""
