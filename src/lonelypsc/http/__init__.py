"""Kept for older imports."""
