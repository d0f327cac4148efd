"""What is measured: counted from committed events, timed, looked at; and told by `/metrics`.

Rules and handlers mention no metric. Every one stands in `table`.
"""

from __future__ import annotations

from sheratan_hub.metrics.counting import Metrics as Metrics
from sheratan_hub.metrics.looking import Looks as Looks
from sheratan_hub.metrics.telling import Telling as Telling
from sheratan_hub.metrics.timing import Lag as Lag
from sheratan_hub.metrics.timing import TimedStore as TimedStore
