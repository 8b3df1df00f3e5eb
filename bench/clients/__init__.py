"""The processes in which clients are measured, and the work that they do."""
