"""Reports for people: pictures, charts and the page around them, each usable on its own."""

from .charts import require_matplotlib
from .demo import DemoResult, demo_report

__all__ = ["DemoResult", "demo_report", "require_matplotlib"]
