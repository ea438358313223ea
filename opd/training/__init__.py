"""The training loop: session, steps, checkpoints, metrics, alarms and the doctor."""
