"""One suite over the backends: what every norm must do, whoever computes it."""
