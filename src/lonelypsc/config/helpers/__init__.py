"""Ways to serve the receiving endpoints."""
