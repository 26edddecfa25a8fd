"""The book: pages of the executed chapters that need no network."""
