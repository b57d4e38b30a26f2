"""Records of jobs: status and metrics (tracking.py), mirrored into MLflow."""
