"""Jobs on a cluster: frozen, checked there, submitted through Ray's Jobs API, watched and stopped."""
