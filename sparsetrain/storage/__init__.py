"""How sparse weights are held."""
