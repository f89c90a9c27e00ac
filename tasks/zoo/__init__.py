"""Datasets of trained networks: many networks trained at once, saved, loaded, described, augmented."""
