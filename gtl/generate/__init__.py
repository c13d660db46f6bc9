"""Drawing pictures: the step-level engine, images with their recipes, the command."""

from gtl.verb import callable_as

callable_as(__name__, "command:run")
