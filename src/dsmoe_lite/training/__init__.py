"""Train a model: the loop, a whole job from one description, its folder, and where its results came from."""
