"""What happened, in order: numbered events, a durable log, and everything that is read from them.

Nothing in here imports the engine; the engine publishes, this package numbers, folds, stores and hands on.
"""
