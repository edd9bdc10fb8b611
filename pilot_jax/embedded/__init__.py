"""The toy world that ships: digit scenes, their tasks, federations of them, and the base that was trained on them."""
