"""What Prometheus scrapes of a cluster, and a Grafana dashboard over it."""
