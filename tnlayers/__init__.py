"""Tensorized drop-in layers."""
