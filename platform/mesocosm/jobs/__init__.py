"""The jobs, one per file with a `JOB` (mesocosm.job.Job), and their registry."""
