"""Comparing models: win rates with intervals."""
