"""Infrastructure of a training: the local stack, and definitions for other places."""
