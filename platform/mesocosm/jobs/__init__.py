"""One file a job, each with a `JOB` (mesocosm.job.Job), and the registry of their names."""
