"""The Lightning layer: thin modules over functional, models and rollouts."""
