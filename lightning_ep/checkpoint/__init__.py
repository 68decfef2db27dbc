"""Train state on disk: saved in full or not at all, loaded on any layout."""
