"""Kept for older imports; nothing is traced."""
