"""A worker process that generates rollouts while the student trains."""
