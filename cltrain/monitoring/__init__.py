"""Own store first, then wandb, Prometheus and one page per update."""
