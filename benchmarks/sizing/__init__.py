"""What a run of a given size asks of storage, disks, MLflow and the head: model, check, measure."""
