"""What latency tables are made of: measuring layers and networks, and reading between points."""
