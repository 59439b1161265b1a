"""What an update tries to do (losses) and how far it may go (bounds)."""
