"""What notebooks use of the companion."""

from . import blind_test as blind_test
from . import figures as figures
from . import measures as measures
from . import recipes as recipes
from . import report as report
from . import toy_problems as toy_problems
from .ledger.claims import verdicts as verdicts
from .runs import Run as Run
