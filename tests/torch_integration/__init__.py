"""What torch does with models: the norms have to go along with all of it, bit for bit."""
