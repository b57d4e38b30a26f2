"""What a job did: status and metrics (tracking.py), mirrored into MLflow."""
