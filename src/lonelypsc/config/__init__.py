"""How a client is configured."""
