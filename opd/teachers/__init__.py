"""Teachers and judges: in this process, behind a server, or text only."""
