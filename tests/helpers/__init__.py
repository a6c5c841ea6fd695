"""What several tests share: models, runs, ranks, a browser."""
