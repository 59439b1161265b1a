"""From what happened in deployment to what may be learned from."""
