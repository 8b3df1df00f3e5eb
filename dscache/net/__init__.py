"""Knowledge of servers that aio and blocking share, sans-IO."""
