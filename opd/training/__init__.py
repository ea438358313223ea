"""The training trainer: session, steps, checkpoints, metrics, alarms and the doctor."""
