"""How good a model is: on held-out images, by the scores of its pictures, and to the eye.

Calling the package is `gtl.evaluate.run.evaluate`.
"""

from gtl.verb import callable_as

callable_as(__name__, "run:evaluate")
