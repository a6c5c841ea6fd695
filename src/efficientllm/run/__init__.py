"""A run on disk and on a terminal: begun, continued, logged, finished."""
