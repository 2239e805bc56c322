"""What adapters share: rows and caches, files and hubs, low-rank adapters."""
