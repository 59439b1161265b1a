"""A whole deployment on a laptop: a base of our own, a world, an agent, and what learning does to it."""
