"""What runs around a training: the local stack, and descriptions of where else it can run."""
