"""What notebooks use of the companion."""

from . import figures as figures
from . import recipes as recipes
from .runs import Run as Run
