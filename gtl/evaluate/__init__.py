"""How good a model is: on held-out images, and to the eye."""
