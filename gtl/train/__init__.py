"""Training: launched on Ray, run by workers through one loop, under DeepSpeed."""

from gtl.verb import callable_as

callable_as(__name__, "launch:train")
